"""Results as people read them: Markdown tables, and sentences about two of them."""

Row = tuple[str, list[str]]  # a row's label and its values

TEXT_MEASURES = (
    "nats_per_token",
    "perplexity",
    "word_perplexity",
    "tokens",
    "bytes",
    "documents",
    "windows",
)


def percent(values: list[float]) -> str:
    value, low, high = values
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def percents(metrics: dict, average: str) -> list[str]:
    """One average of every metric."""
    return [percent(metric[average]) for metric in metrics.values()]


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
    cells = " | ".join([label, *values])
    return f"| {cells} |"


def markdown(rows: list[Row]) -> list[str]:
    """The lines of a table from its labels and values; the first row names the columns."""
    head, *body = [row(label, values) for label, values in rows]
    _, columns = rows[0]
    aligned_right = row("---", ["---:"] * len(columns))
    return [head, aligned_right, *body]


def describe_result(result: dict, published: tuple[tuple[str, str], ...]) -> str:
    """A result in Markdown.

    Its averages beside published scores of the same protocol, what was kept, and the subjects.
    """
    lines = [
        heading(result["task"], result["protocol"]),
        "",
        f"{result['model']}: {describe_prompts(result)}",
        "",
    ]
    scores = result["scores"]
    if result["task"] == "perplexity":
        lines += perplexity_table(scores)
    else:
        lines += averages_table(scores["scores"], published)
        lines += ["", describe_counts(scores)]
        lines += subjects_table(scores["scores"])
    return "\n".join(lines)


def describe_prompts(result: dict) -> str:
    shots = result["shots"]
    wrapped = "[INST] … [/INST]" if result["chat"] else "raw"
    bos = "on" if result["bos"] else "off"
    return f"{shots} shots, {wrapped} prompts, BOS {bos}, {result['dtype']}"


def describe_counts(scores: dict) -> str:
    questions = f"{scores['questions']:,} questions"
    kept = f"shots kept {scores['shots_kept']}"
    ties = f"{scores['ties']} ties"
    cut = f"{scores['cut_from_the_left']} prompts cut from the left"
    return "; ".join((questions, kept, ties, cut))


def perplexity_table(scores: dict) -> list[str]:
    bits, low, high = scores["bits_per_byte"]
    rows = [
        ("measure", ["value"]),
        ("bits_per_byte", [f"{bits:.4f} ({low:.4f} to {high:.4f})"]),
    ]
    for name in TEXT_MEASURES:
        if name in scores:
            value = scores[name]
            shown = "more than a number can hold" if value is None else f"{value:,.6g}"
            rows.append((name, [shown]))
    return markdown(rows)


def averages_table(metrics: dict, published: tuple[tuple[str, str], ...]) -> list[str]:
    rows = [("score", list(metrics))]
    for average in ("micro", "macro"):
        rows.append((average, percents(metrics, average)))
    for category in metrics.get("acc", {}).get("categories", ()):
        categories = {name: metric["categories"] for name, metric in metrics.items()}
        rows.append((category, percents(categories, category)))
    empty = [""] * (len(metrics) - 1)
    for model, value in published:
        shown = f"{value}%".replace(" /", "% /")  # of two scores both are percentages
        rows.append((model, [shown, *empty]))
    return markdown(rows)


def subjects_table(metrics: dict) -> list[str]:
    """A row for each of several subjects; a cell is empty where a metric has none of it."""
    subjects = {}  # in the order in which they come
    for metric in metrics.values():
        subjects |= dict.fromkeys(metric["subjects"])
    if len(subjects) < 2:
        return []
    rows = [("score", list(metrics))]
    for subject in subjects:
        found = [metric["subjects"].get(subject) for metric in metrics.values()]
        cells = [percent(values) if values else "" for values in found]
        rows.append((subject, cells))
    return ["", *markdown(rows)]


def say_difference(found: dict, paths: tuple[str, ...]):
    """Print what `paired_difference` found."""
    scale, unit = (1, "") if found["score"] == "bits a byte" else (100, " points")
    value, low, high = (scale * bound for bound in found["difference"])
    first = f"{paths[0]} {scale * found['first']:.4g}"
    second = f"{paths[1]} {scale * found['second']:.4g}"
    drawn = "documents" if "documents" in found else "questions"
    print(f"{found['score']} on {found[drawn]:,} {drawn}: {first}, {second}")
    interval = f"95 % interval {low:+.3g} to {high:+.3g}"
    print(f"difference {value:+.3g}{unit}, {interval}")
    if "only_first" in found:
        only_first = f"only the first is right {found['only_first']} times"
        only_second = f"only the second {found['only_second']} times"
        print(f"{only_first}, {only_second}")
    verdict = "no more than chance may do: they may be alike"
    if found["p"] < 0.05:
        verdict = "more than chance: they differ"
    test = f"{found['test']}: p = {found['p']:.2g}"
    print(f"{test}, {verdict} on such {drawn}")
    other = "whether their settings differ, only more seeds of each can tell"
    print(f"This is about these two models; {other}")
