"""The verb `push`."""

from __future__ import annotations

from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, parser_of


def push(argv: list[str]) -> Result:
    """Upload a run's model to the Hugging Face hub, with a model card that has the run's figures.

    Example: vimoe push runs/photos me/photos --private true
    """
    parser = parser_of(push, revision="branch to commit to (default: main)")
    parser.add_argument("run", help="run folder")
    parser.add_argument("repo", help="repository, USER/REPO, which is made if it is not there")
    parser.add_argument("--private", type=bool | None, default=None, help="make a new repository private")
    parser.add_argument("--message", type=str, default="Upload model", help="message of the commit")
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.experiments.push import push_run

    url = push_run(options["run"], options["repo"], options["private"], options["message"], options["revision"])
    return url, {"url": url}
