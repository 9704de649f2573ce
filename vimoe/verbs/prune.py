"""The verb `prune`."""

from __future__ import annotations

from vimoe.config.analysis import PRUNE_TOLERANCE
from vimoe.errors import counted
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, parser_of, required_out


def prune(argv: list[str]) -> Result:
    """Make dense the MoE layers that validation does not support, or all; write a new run with a receipt.

    Example: vimoe prune runs/photos --out runs/photos-pruned
    """
    parser = parser_of(prune, out="folder to create for the pruned run")
    parser.add_argument("run", help="run folder")
    tolerance = "largest accepted upper bound of the loss change by a removal, in nats"
    parser.add_argument("--tolerance", type=float, default=PRUNE_TOLERANCE, help=tolerance)
    parser.add_argument(
        "--experts", type=bool, default=False, help="also remove single experts of the layers that stay"
    )
    merge_all = "make every MoE layer dense, as the mean of its experts or their pieces together, whatever it costs"
    parser.add_argument("--merge_all", type=bool, default=False, help=merge_all)
    parser.add_argument("--recover", type=int, default=0, help="number of epochs to train the pruned model")
    parser.add_argument(
        "--recover_lr",
        type=float | None,
        default=None,
        help="learning rate of --recover (default: a tenth of the run's)",
    )
    options = parser.parse_args(argv)
    out = required_out(options)
    open_run(options["run"])
    from vimoe.experiments.finished_run import FinishedRun
    from vimoe.metrics.registry import shown
    from vimoe.report.table_cells import receipt_header, receipt_row

    keys = ("tolerance", "experts", "recover", "recover_lr", "merge_all")
    values = FinishedRun(options["run"]).prune(out, **{key: options[key] for key in keys})
    stages = [key for key in ("before", "after", "recovered") if key in values]
    rows = [receipt_header(shown(values["before"])), *(receipt_row(key, [values[key]]) for key in stages)]
    table = ["".join(f"{cell:>15}" for cell in row) for row in rows]
    measured = f"measured on {counted(values['before']['images'], values['split'] + ' image')}"
    return "\n".join([values.pop("text"), *table, measured, values["report"]]), values
