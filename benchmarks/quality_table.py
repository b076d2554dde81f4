"""The records of the quality study as a table and as a figure."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.methods import DEFAULT, EQUAL_STEPS, METHODS, PLAIN
from kdlib.evaluation import verdict

COLOURS = {"ours": "#D55E00", "mixed": "#009E73", "parts": "#E69F00", "rivals": "#0072B2", "search": "#CC79A7"}
COLOURS["control"] = "#999999"
MARKERS = {"control": "s", "ours": "o", "mixed": "P", "parts": "D", "rivals": "^", "search": "v"}
NAMES = {
    "control": "plain training", "ours": "kdlib's ways of kd", "mixed": "mixtures of these",
    "parts": "kdlib's default with a part", "rivals": "published rivals", "search": "the default, changed",
}  # fmt: skip


def cells_of(known):
    """`{(setting record, kind): {method: its runs at the seeds that count, by seed}}`, the newest text of each setting and
    the newest cell of each method.
    """
    newest = {record["setting"]: record for record in known if record["what"] == "setting"}
    found = {}
    for record in known:
        fits = record["what"] == "run" and "bits" in record and record["method"] in METHODS
        if fits and newest[record["setting"]]["text"] == record["text"]:
            methods = found.setdefault((record["setting"], record["kind"]), {})
            runs = methods.setdefault(record["method"], {})
            if any(run["cell"] != record["cell"] for run in runs.values()):
                runs.clear()
            runs[record["seed"]] = record
    return {(newest[name]["setting"], kind): (newest[name], methods) for (name, kind), methods in found.items()}


def gain(runs, control, num_bytes):
    """`(mean, low, high)`: bits per byte that `runs` save against `control`, paired by seed; None without a pair."""
    seeds = sorted(runs.keys() & control.keys())
    if not seeds:
        return None
    bits = [np.array([side[seed]["bits"] for seed in seeds]) for side in (control, runs)]
    return verdict.gain_interval(*bits, np.array(num_bytes))


def table(known):
    """Markdown, a table for each setting and beginning of the student."""
    costs = {(r["setting"], r["text"], r["method"]): r["ratio"] for r in known if r["what"] == "cost"}
    lines = []
    for (name, kind), (setting, methods) in cells_of(known).items():
        before = f", {setting['trained_before']:.4f} before" if kind == "pretrained" else ""
        lines += [
            f"\n### {name}, student {'trained before' if kind == 'pretrained' else 'from scratch'}\n",
            f"{setting['about']}; teacher at {setting['teacher']:.4f} bits per byte{before}; "
            f"{setting['coverage']:.1%} of the student's positions aligned, {setting['shared_tokens']:,} tokens shared.\n",
            "| method | a step costs | steps | best at | cell | seeds | bits per byte | over CE only, equal wall-clock "
            "| over CE only, equal steps | over the default |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for method in (m for m in METHODS if m in methods):
            runs = methods[method]
            cost = costs.get((name, setting["text"], method), 1.0)
            lines.append(_row(method, runs, cost, [
                "" if method == other else _said(gain(runs, methods.get(other, {}), setting["num_bytes"]))
                for other in (PLAIN, EQUAL_STEPS, DEFAULT)
            ]))  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(method, runs, cost, gains):
    some = next(iter(runs.values()))
    mean = {key: np.mean([run[key] for run in runs.values()]) for key in ("steps", "best_step", "bits_per_byte")}
    cell = ", ".join(
        f"{key.removesuffix('_weight').replace('learning_rate', 'lr')} {value:g}" for key, value in some["cell"].items()
    )
    return (
        f"| {method} | {cost:.2f} | {mean['steps']:.0f} | {mean['best_step']:.0f} | {cell} | {len(runs)} "
        f"| {mean['bits_per_byte']:.4f} | {' | '.join(gains)} |"
    )


def _said(found):
    return "" if found is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*found)


def draw(known, path):
    """Every method's gain over plain training at equal wall-clock, with its interval, a panel a setting."""
    cells = {key: cell for key, cell in cells_of(known).items() if PLAIN in cell[1] and len(cell[1]) > 1}
    if not cells:
        return
    columns = min(3, len(cells))
    every = list(cells.values())
    rows = [every[i : i + columns] for i in range(0, len(every), columns)]
    shown = [[m for m in METHODS if m != PLAIN and any(m in methods for _, methods in row)] for row in rows]
    height = sum(0.7 + 0.2 * len(row) for row in shown)
    figure = Figure(figsize=(2.2 + 3.1 * columns, 1.2 + height), layout="constrained")
    ratios = [2 + len(row) for row in shown]
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row", height_ratios=ratios)
    for axes in grid.flat[len(cells) :]:
        axes.set_visible(False)
    for number, (axes, ((name, kind), (setting, methods))) in enumerate(zip(grid.flat, cells.items(), strict=False)):
        here = shown[number // columns]
        for place, method in enumerate(here):
            found = gain(methods.get(method, {}), methods[PLAIN], setting["num_bytes"])
            group = METHODS[method].group
            if found:
                mean, low, high = found
                style = {"color": COLOURS[group], "marker": MARKERS[group]}
                axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], ms=5, lw=1.4, capsize=2, ls="", **style)
        axes.axvline(0.0, color="#1a1a1a", lw=0.8)
        axes.set_title(f"{name}, {'trained before' if kind == 'pretrained' else 'from scratch'}", fontsize=9)
        axes.set_yticks(range(len(here)), here, fontsize=8)
        axes.set_ylim(len(here) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", color="#d9d9d9", lw=0.6)
        axes.set_axisbelow(True)
    groups = [group for group in NAMES if any(METHODS[m].group == group for row in shown for m in row)]
    handles = [axes.plot([], [], ls="", ms=5, color=COLOURS[g], marker=MARKERS[g], label=NAMES[g])[0] for g in groups]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(groups), frameon=False, fontsize=8)
    figure.supxlabel(
        "bits per byte saved against plain training at equal wall-clock, 95 % interval (right is better)", fontsize=9
    )
    figure.savefig(path, dpi=150)
