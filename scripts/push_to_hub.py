"""Push a checkpoint to the Hub: `python scripts/push_to_hub.py FOLDER me/my-model --license apache-2.0`."""

import argparse

from zoo.catalogue import human_bytes
from zoo.hub import push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what save_pretrained wrote, with the tokenizer and result files beside it")
    parser.add_argument("repo_id", help="owner/name; without an owner, that of the token")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--new", action="store_true", help="refuse a repository that exists")
    parser.add_argument("--revision", help="branch, made if need be; default main")
    parser.add_argument("--create-pr", action="store_true", help="propose the commit instead of making it")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--layout", help="write a foreign layout, one of zoo.layouts()")
    parser.add_argument("--license", help="for the card, as the Hub spells it: apache-2.0, mit, other...")
    parser.add_argument("--base-model", nargs="+", help="for the card: Hub ids of what this was made from")
    parser.add_argument("--tags", nargs="+", default=(), help="for the card")
    parser.add_argument("--dry-run", action="store_true", help="change nothing; list what would go")
    parser.add_argument("--token", help="default: HF_TOKEN, or what `hf auth login` stored")
    args = parser.parse_args()
    pushed = push(
        args.folder, args.repo_id, token=args.token, private=args.private, revision=args.revision, commit_message=args.message,
        create_pr=args.create_pr, exist_ok=not args.new, dry_run=args.dry_run, layout=args.layout, license=args.license,
        base_model=args.base_model, tags=args.tags,
    )  # fmt: skip
    for name, size in pushed.files.items():
        print(f"{human_bytes(size):>12}  {name}")
    for name in pushed.removed:
        print(f"{'removed':>12}  {name}")
    for name in pushed.left_out:
        print(f"{'left out':>12}  {name}")
    total = human_bytes(sum(pushed.files.values()))
    print(f"{total} would go to {pushed.repo_id}" if args.dry_run else f"{total}: {pushed.commit.pr_url or pushed.commit.commit_url}")


if __name__ == "__main__":
    main()
