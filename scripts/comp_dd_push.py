"""Pushes built subsets of ImageNet to a private repository, or the index of their classes to a public one.

ImageNet's terms do not allow its pictures in public repositories. The index has classes, counts and complexities, and
no picture.

Example: `hf-effml comp-dd push comp-dd me/comp-dd-pictures`
"""

import sys
from dataclasses import dataclass, field

from hf_effml.cli.parsing import parse_arguments, run_script


@dataclass
class PushArguments:
    """What to push, and where to."""

    folder: str | None = field(default=None, metadata={"help": "Where the subsets were built.", "positional": True})
    repo: str | None = field(default=None, metadata={"help": "Hub id: namespace/name.", "positional": True})
    index: str | None = field(
        default=None, metadata={"help": "Hub id to push the index of Comp-DD to, which is public, without a picture."}
    )
    public: bool = field(default=False, metadata={"help": "Make a new repository of pictures public, with a gate."})
    i_hold_the_rights: bool = field(
        default=False, metadata={"help": "State that you may redistribute the pictures; a public repository needs it."}
    )
    commit_message: str | None = field(default=None, metadata={"help": "First line of the commit."})

    def __post_init__(self) -> None:
        missing = [value is None for value in (self.folder, self.repo, self.index)]
        if missing not in ([False, False, True], [True, True, False]):
            raise ValueError("Name the FOLDER and the REPO of the pictures, or the repository of the `--index`.")


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(PushArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml.comp_dd import push_comp_dd, push_index

    if args.index is not None:
        commit = push_index(args.index, commit_message=args.commit_message)
    else:
        rights = {"private": not args.public, "holds_rights": args.i_hold_the_rights}
        commit = push_comp_dd(args.folder, args.repo, **rights, commit_message=args.commit_message)
    print(f"Pushed {'the index' if args.index else args.folder}: {commit.commit_url}")
    return {"repo": args.index or args.repo, "commit": commit.oid, "url": commit.commit_url}


if __name__ == "__main__":
    sys.exit(run_script(main))
