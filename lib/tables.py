"""Results as people read them: Markdown tables, and sentences about two of them."""

def percent(values: list[float]) -> str:
    return f"{values[0]:.1%} ({values[1]:.1%} to {values[2]:.1%})"


def heading(task: str, protocol: str) -> str:
    return f"# {task}, protocol {protocol}"


def headline(result: dict, average: str) -> tuple[str, list[float]]:
    """The name of a result's main score and its [value, low, high]."""
    scores = result["scores"]
    if result["task"] == "perplexity":
        return "bits a byte", scores["bits_per_byte"]
    name, values = next(iter(scores["scores"].items()))
    return f"{name}, {average}", values[average]


def row(label: str, values: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join([label, *values]) + " |"


def markdown(rows: list[tuple[str, list[str]]]) -> list[str]:
    """The lines of a table from its labels and values; the first row names the columns."""
    head, *body = [row(label, values) for label, values in rows]
    return [head, row("---", ["---:"] * len(rows[0][1])), *body]


def describe_result(result: dict, published: tuple[tuple[str, str], ...]) -> str:
    """A result in Markdown.

    Its averages beside published scores of the same protocol, what was kept, and the subjects.
    """
    scores = result["scores"]
    wrapped = "[INST] … [/INST]" if result["chat"] else "raw"
    bos = "on" if result["bos"] else "off"
    prompt = f"{result['shots']} shots, {wrapped} prompts, BOS {bos}, {result['dtype']}"
    lines = [heading(result["task"], result["protocol"]), "", f"{result['model']}: {prompt}", ""]
    if result["task"] == "perplexity":
        return "\n".join(lines + perplexity_table(scores))
    lines += averages_table(scores["scores"], published)
    kept, ties, cut = scores["shots_kept"], scores["ties"], scores["cut_from_the_left"]
    counts = f"{scores['questions']:,} questions; shots kept {kept}; {ties} ties"
    lines += ["", f"{counts}; {cut} prompts cut from the left"]
    return "\n".join(lines + subjects_table(scores["scores"]))


def perplexity_table(scores: dict) -> list[str]:
    bits = scores["bits_per_byte"]
    interval = f"{bits[0]:.4f} ({bits[1]:.4f} to {bits[2]:.4f})"
    rows = [("measure", ["value"]), ("bits_per_byte", [interval])]
    names = ("nats_per_token", "perplexity", "word_perplexity", "tokens", "bytes", "documents", "windows")
    for name in names:
        if name in scores:
            value = scores[name]
            shown = "more than a number can hold" if value is None else f"{value:,.6g}"
            rows.append((name, [shown]))
    return markdown(rows)


def averages_table(metrics: dict, published: tuple[tuple[str, str], ...]) -> list[str]:
    rows = [("score", list(metrics))]
    for average in ("micro", "macro"):
        rows.append((average, [percent(metric[average]) for metric in metrics.values()]))
    for category in metrics.get("acc", {}).get("categories", ()):
        found = [percent(metric["categories"][category]) for metric in metrics.values()]
        rows.append((category, found))
    empty = [""] * (len(metrics) - 1)
    for model, value in published:
        rows.append((model, [f"{value}%".replace(" /", "% /"), *empty]))
    return markdown(rows)


def subjects_table(metrics: dict) -> list[str]:
    """A row for each subject, where there are several; empty cells where a metric has none of it."""
    subjects = dict.fromkeys(name for metric in metrics.values() for name in metric["subjects"])
    rows = [("score", list(metrics))]
    for subject in subjects:
        found = [metric["subjects"].get(subject) for metric in metrics.values()]
        rows.append((subject, [percent(values) if values else "" for values in found]))
    return ["", *markdown(rows)] if len(subjects) > 1 else []


def say_difference(found: dict, paths: tuple[str, ...]):
    """Print what `paired_difference` found."""
    scale, unit = (1, "") if found["score"] == "bits a byte" else (100, " points")
    value, low, high = (scale * bound for bound in found["difference"])
    first, second = scale * found["first"], scale * found["second"]
    drawn = "documents" if "documents" in found else "questions"
    each = f"{paths[0]} {first:.4g}, {paths[1]} {second:.4g}"
    print(f"{found['score']} on {found[drawn]:,} {drawn}: {each}")
    print(f"difference {value:+.3g}{unit}, 95 % interval {low:+.3g} to {high:+.3g}")
    if "only_first" in found:
        only = f"only the first is right {found['only_first']} times"
        print(f"{only}, only the second {found['only_second']} times")
    verdict = "no more than chance may do: they may be alike"
    if found["p"] < 0.05:
        verdict = "more than chance: they differ"
    print(f"{found['test']}: p = {found['p']:.2g}, {verdict} on such {drawn}")
    other = "whether their settings differ, only more seeds of each can tell"
    print(f"This is about these two models; {other}")
