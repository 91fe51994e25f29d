"""List what the zoo holds: `python scripts/list_models.py [PATTERN] [--presets | --mixers | --layouts]`."""

import argparse

import zoo
from zoo.registry import get

KINDS = {"presets": zoo.list_presets, "mixers": zoo.list_mixers, "layouts": lambda: sorted(zoo.layouts())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="only names, and titles of publications, that contain this")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--presets", action="store_true", help="names for zoo.from_config")
    kinds.add_argument("--mixers", action="store_true", help="names for the layers of a hybrid")
    kinds.add_argument("--layouts", action="store_true", help="checkpoints of others that zoo.from_pretrained reads")
    args = parser.parse_args()
    chosen = next((names for kind, names in KINDS.items() if getattr(args, kind)), None)
    rows = dict.fromkeys(chosen(), "") if chosen else {name: f"{get(name).title}, {get(name).paper}" for name in zoo.list_models()}
    found = {name: text for name, text in rows.items() if args.pattern.lower() in f"{name} {text}".lower()}
    if not found:
        raise ValueError(f"nothing in the list contains {args.pattern!r}; leave the pattern out to see all {len(rows)}")
    width = max(map(len, found))
    print("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in found.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
