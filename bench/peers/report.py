"""The table and the chart of what was measured."""

import sys

from networks import CONTESTANTS, PRECISIONS, SETTINGS

_COLOURS = {"cycnn": "tab:green", "torch": "tab:orange", "jax": "tab:blue"}


def merged(contents):
    """The results of several runs as those of one.

    Each result then says in ``run`` which of the ``runs`` it is from, from 1 on. The
    figures of a later run replace those of an earlier one.
    """
    if len(contents) == 1:
        return contents[0]
    found = {name: {} for name in SETTINGS}
    for number, content in enumerate(contents, 1):
        for name, results in content["results"].items():
            for who, result in results.items():
                found[name][who] = {**result, "run": number}
    order = {name: i for i, name in enumerate(CONTESTANTS)}
    return {
        "runs": contents,
        "results": {
            name: dict(sorted(results.items(), key=lambda item: order[item[0]]))
            for name, results in found.items()
            if results
        },
    }


def table(content):
    """Everything as text."""
    lines = [
        mark + ", ".join(f"{key} {value}" for key, value in about.items())
        for mark, about in _runs(content)
    ]
    for name, results in content["results"].items():
        lines += ["", f"{name}: {SETTINGS[name].text}"]
        lines += _rows(name, content)
    lines += ["", "x cycnn: time divided by cycnn's in the same run and precision"]
    finished = [
        result
        for results in content["results"].values()
        for result in results.values()
        if "error" not in result
    ]
    if not all(result["learned"] for result in finished):
        lines.append("!: accuracy too low; the time does not count")
    return "\n".join(lines)


def _runs(content):
    """(mark, about) of each run; one alone needs no mark."""
    if "runs" not in content:
        return [("", content["about"])]
    return [(f"[{i}] ", run["about"]) for i, run in enumerate(content["runs"], 1)]


def _mark(result):
    return f" [{result['run']}]" if "run" in result else ""


def _ratio(setting, name, content):
    """The contestant's time divided by cycnn's: of one run, since runs differ."""
    result = content["results"][setting][name]
    run = content["runs"][result["run"] - 1] if "run" in result else content
    own = run["results"][setting].get(f"cycnn-{_precision(name)}", {})
    return f"{result['median'] / own['median']:.2f}" if "median" in own else "-"


def _rows(name, content):
    setting = SETTINGS[name]
    yield (
        f"{'contestant':<20} {setting.unit:>10} {'spread':>17} {'x cycnn':>8} "
        f"{'accuracy':>9}  version, settings"
    )
    for who, result in content["results"][name].items():
        label = who + _mark(result)
        if "error" in result:
            yield f"{label:<20} {result['error'].splitlines()[0]}"
            continue
        times = [setting.scale * seconds for seconds in result["seconds"]]
        accuracy = f"{result['accuracy']:.2%}" + "!" * (not result["learned"])
        yield (
            f"{label:<20} {_short(setting.scale * result['median']):>10} "
            f"{f'{_short(min(times))}..{_short(max(times))}':>17} "
            f"{_ratio(name, who, content):>8} {accuracy:>9}  "
            f"{result['version']}, {result['settings']}"
        )
        if "phases" in result:
            phases = (f"{what} {took:.2f}" for what, took in result["phases"].items())
            yield f"{'':<20} s: {', '.join(phases)}"


def _short(number):
    """About four digits."""
    decimals = sum(number < limit for limit in (1000, 100, 10))
    return f"{number:.{decimals}f}"


def _precision(name):
    return name.rsplit("-", 1)[1]


def chart(content, path):
    """Write bars of all times, a panel a setting, as PNG."""
    from matplotlib.figure import Figure

    shown = {
        name: {who: r for who, r in results.items() if r.get("learned")}
        for name, results in content["results"].items()
    }
    shown = {name: results for name, results in shown.items() if results}
    if not shown:
        sys.exit("there is nothing to draw: nobody was accurate enough")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    tallest = max(map(len, shown.values()))
    figure = Figure(
        figsize=(6 * columns, (1 + 0.26 * tallest) * rows), layout="constrained"
    )
    titles = (
        mark + ", ".join(map(str, about.values())) for mark, about in _runs(content)
    )
    figure.suptitle("\n".join(titles))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for axes, (name, results) in zip(panels, shown.items()):
        setting = SETTINGS[name]
        order = sorted(results, key=lambda who: PRECISIONS.index(_precision(who)))
        times = [setting.scale * results[who]["median"] for who in order]
        colours = [_COLOURS[who.split("-")[0]] for who in order]
        bars = axes.barh([w + _mark(results[w]) for w in order], times, color=colours)
        axes.bar_label(bars, map(_short, times), padding=2, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{name}, {setting.unit}", fontsize=9)
    figure.savefig(path, dpi=120, format="png")
