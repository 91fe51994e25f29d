"""Download a checkpoint from the Hub into a folder: `python scripts/pull_from_hub.py me/my-model FOLDER`."""

import argparse

from zoo.catalogue import human_bytes
from zoo.hub import pull


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("folder", help="appears once everything has arrived whole")
    parser.add_argument("--revision", help="branch, tag or commit; default main")
    parser.add_argument("--token", help="for a private repository; default: HF_TOKEN, or what `hf auth login` stored")
    args = parser.parse_args()
    folder = pull(args.repo_id, args.folder, revision=args.revision, token=args.token)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        print(f"{human_bytes(path.stat().st_size):>12}  {path.name}")
    print(f"{human_bytes(sum(path.stat().st_size for path in files))} in {folder}")


if __name__ == "__main__":
    main()
