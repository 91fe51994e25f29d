"""Turn a pretrained transformer into a hybrid of any of the zoo's mixers.

    teacher = load_teacher(prepare_teacher("smollm2-135m-instruct", "teacher"))
    student = convert(teacher, mixer="gated_deltanet", keep=[8, 14, 18, 20, 23, 24])
    align(teacher, student, rows, steps=48)

`zoo.convert.folder` does it by a recipe, in a folder that can be resumed; `zoo.convert.card` measures what came of it.
"""

from zoo.convert.align import align
from zoo.convert.select import most_sensitive, window_sensitivity
from zoo.convert.student import convert, converted_layers
from zoo.convert.teacher import check_logits, load_teacher, prepare_teacher
from zoo.convert.texts import pydoc_topics, token_rows
from zoo.convert.weights import Account, seed_student

__all__ = [
    "Account", "align", "check_logits", "convert", "converted_layers", "load_teacher", "most_sensitive", "prepare_teacher",
    "pydoc_topics", "seed_student", "token_rows", "window_sensitivity",
]  # fmt: skip
