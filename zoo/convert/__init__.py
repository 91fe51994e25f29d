"""Turn a pretrained transformer into a hybrid of any of the zoo's mixers.

    teacher = load_teacher(prepare_teacher("smollm2-135m-instruct", "teacher"))
    student = convert(teacher, mixer="gated_deltanet", keep=[8, 14, 18, 20, 23, 24])
    align(teacher, student, rows, steps=48)

`run` does all of it with measurements.
"""

from zoo.convert.align import align
from zoo.convert.run import Outcome, Recipe, complete, run
from zoo.convert.select import most_sensitive, window_sensitivity
from zoo.convert.student import convert, converted_layers
from zoo.convert.teacher import check_logits, load_teacher, prepare_teacher
from zoo.convert.texts import pydoc_topics, read_texts, token_rows
from zoo.convert.weights import Account, seed_student

__all__ = [
    "Account", "Outcome", "Recipe", "align", "check_logits", "complete", "convert", "converted_layers", "load_teacher", "most_sensitive",
    "prepare_teacher", "pydoc_topics", "read_texts", "run", "seed_student", "token_rows", "window_sensitivity",
]  # fmt: skip
