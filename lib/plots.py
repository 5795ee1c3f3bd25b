"""The pictures: matplotlib is imported when one is drawn."""

from pathlib import Path


def draw_losses(rows: list[dict], path: Path, title: str, unit: str):
    """loss.png: training and validation loss against the step, of the rows of log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        axes.plot(steps, losses, style, label=label, linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss (nats a {unit})", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
