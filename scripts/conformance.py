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
from zoo.evaluate.battery import MIXER_PROPERTIES, MODEL_PROPERTIES, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=zoo.list_models(encoder_decoder=False), help="architectures (default: all)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what failed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = 0
    print(f"{'architecture':<20} {'parameters':>10} {'properties':>10} {'state @1k':>12} {'state @8k':>12}")
    for name in tqdm(args.names, unit="architecture", leave=False):
        properties = MODEL_PROPERTIES | (MIXER_PROPERTIES if registry.get(name).mixer else {})
        results = run(name, properties)
        with torch.device("meta"):
            model = model_class(zoo.build_config(f"{name}-tiny"), "base")(zoo.build_config(f"{name}-tiny"))
        count = sum(p.numel() for p in model.parameters())
        held = sum(error is None for error in results.values())
        bytes_at = (
            sum(t.nbytes for b in model.layers for t in b.initial_state(1, n, torch.float32, "meta").values()) for n in (1024, 8192)
        )
        tqdm.write(f"{name:<20} {count:>10,} {f'{held}/{len(results)}':>10} " + " ".join(f"{b:>12,}" for b in bytes_at))
        failed += len(results) - held
        if args.verbose:
            for label, error in results.items():
                if error:
                    tqdm.write(f"  {label}\n{error}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
