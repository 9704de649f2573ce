"""The verbs of the command line, a file each: parse options, call the library, return what to print.

Each verb is one function, which holds its slow imports; its docstring is its help.
"""

from __future__ import annotations

from vimoe.verbs import (
    analyze,
    bench,
    count,
    demo,
    diagnose,
    evaluate,
    explore,
    export,
    plan,
    predict,
    prune,
    push,
    report,
    study,
    train,
    trust,
)
from vimoe.verbs.options import Verb

SHARED = ("train", "evaluate", "predict", "analyze")  # verbs whose work several processes may share

VERBS: dict[str, Verb] = {
    "demo": demo.demo,
    "plan": plan.plan,
    "count": count.count,
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "predict": predict.predict,
    "trust": trust.trust,
    "analyze": analyze.analyze,
    "diagnose": diagnose.diagnose,
    "explore": explore.explore,
    "prune": prune.prune,
    "export": export.export,
    "report": report.report,
    "push": push.push,
    "study": study.study,
    "bench": bench.bench,
}
