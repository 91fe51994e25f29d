"""Run the battery and print a line per architecture: parameters, properties held, state bytes.

python scripts/conformance.py [NAME ...] [-v]
"""

import argparse
import warnings

import torch
from tqdm import tqdm

import zoo
from zoo import registry
from zoo.auto import model_class
from zoo.evaluate.battery import MIXER_PROPERTIES, MODEL_PROPERTIES, SEQ2SEQ_PROPERTIES, Pair, run
from zoo.evaluate.speed import state_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=zoo.list_models(), help="architectures (default: all)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what failed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = 0
    print(f"{'architecture':<20} {'parameters':>10} {'properties':>10} {'state @1k':>12} {'state @8k':>12}")
    for name in tqdm(args.names, unit="architecture", leave=False):
        if registry.get(name).config.is_encoder_decoder:
            results = run(name, SEQ2SEQ_PROPERTIES, Pair)
        else:
            results = run(name, MODEL_PROPERTIES | (MIXER_PROPERTIES if registry.get(name).mixer else {}))
        with torch.device("meta"):
            model = model_class(zoo.build_config(f"{name}-tiny"), "base")(zoo.build_config(f"{name}-tiny"))
        count = sum(p.numel() for p in model.parameters())
        held = sum(error is None for error in results.values())
        bytes_at = (state_bytes(model, length) for length in (1024, 8192))
        tqdm.write(f"{name:<20} {count:>10,} {f'{held}/{len(results)}':>10} " + " ".join(f"{b:>12,}" for b in bytes_at))
        failed += len(results) - held
        if args.verbose:
            for label, error in results.items():
                if error:
                    tqdm.write(f"  {label}\n{error}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
