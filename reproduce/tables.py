"""The tables of scores in the READMEs, made from the files of scores in results/.

    python -m reproduce.tables

results/<task>/<run>/score_*.json are those that `python ractd.py distill` and `python -m
reproduce.seeds` write, a folder for each run: seed<s> for the default with that training
seed, <name>_seed<s> for another run that the table calls <name>.
results/<task>/baselines/<algorithm>_seed<s>.json are those of `reproduce.baselines`.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


def read_scores(folder=RESULTS):
    """{task: {(what acted, calls): {run: (mean score, standard error)}}} of all files there."""
    found = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*/*/score_*.json")):
        metrics = json.loads(path.read_text())
        task, run = path.parts[-3:-1]
        label = metrics["method"] if run.startswith("seed") else run.partition("_seed")[0]
        row = found[task][label, metrics["calls"]]
        if run in row:
            raise SystemExit(f"{path}: a second score of {label}, {metrics['calls']} call(s)")
        row[run] = (metrics["score_mean"], metrics["score_sem"])
    for path in sorted(folder.glob("*/baselines/*_seed*.json")):
        metrics = json.loads(path.read_text())
        row = found[path.parts[-3]][f"{metrics['algorithm']} of d3rlpy", 1]
        row[f"seed{metrics['seed']}"] = (metrics["score_mean"], metrics["score_sem"])
    return found


def print_scores(found):
    """A Markdown table: the mean over training seeds, and each of them where there are more."""
    print(f"| | calls | {' | '.join(found)} |\n|{'---|' * (2 + len(found))}")
    for label, calls in sorted({row for rows in found.values() for row in rows}):
        cells = []
        for rows in found.values():
            runs = rows.get((label, calls), {})
            each = ", ".join(f"{mean:.1f} ± {sem:.1f}" for mean, sem in runs.values())
            average = np.mean([mean for mean, _ in runs.values()]) if runs else None
            cells.append(f"**{average:.1f}**: {each}" if len(runs) > 1 else each)
        print(f"| {label} | {calls} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print_scores(read_scores())
