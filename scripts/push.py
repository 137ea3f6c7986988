"""Uploads the folder of a model, a distilled data set or a bank of experts with its card.

Example: `hf-effml push rmeeto-smoke alice/rmeeto-smoke --private`
"""

import sys
from dataclasses import dataclass, field

from hf_effml.cli.parsing import parse_arguments, run_script


@dataclass
class PushArguments:
    """What to upload, and where to."""

    folder: str = field(
        metadata={"help": "Folder that a Trainer, `save_pretrained` or a program here wrote.", "positional": True}
    )
    repo: str = field(metadata={"help": "Hub id to push to: namespace/name.", "positional": True})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; made when it does not exist."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str | None = field(default=None, metadata={"help": "First line of the commit."})
    license: str | None = field(
        default=None, metadata={"help": "License to name on the card, a keyword of the Hub such as apache-2.0."}
    )


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program with the arguments `argv` (the command line's when None) and returns its results."""
    (args,) = parse_arguments(PushArguments, argv=argv, program=__file__, description=__doc__)
    from hf_effml.hub import push_folder
    from hf_effml.hub.checks import what_stays_here

    commit = push_folder(
        args.folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
        license=args.license,
    )
    print(f"Pushed {args.folder}: {commit.pr_url or commit.commit_url}")
    left_out = what_stays_here(args.folder)
    if left_out:
        print("Left out: " + ", ".join(f"{name} ({size:,} bytes)" for name, size in left_out.items()))
    return {
        "left_out": list(left_out),
        "repo": args.repo,
        "commit": commit.oid,
        "url": commit.commit_url,
        "pull_request": commit.pr_url,
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
