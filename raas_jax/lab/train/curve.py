"""The training curve as a picture, from the `metrics.jsonl` that the trainer writes."""

from pathlib import Path

from raas_jax.lab.train.metrics import read_metrics

__all__ = ["draw_curve", "read_metrics"]


def draw_curve(metrics: list[dict[str, float]], file: Path) -> None:
    """Loss above, share of exact derivations in training and validation below; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [each["step"] for each in metrics]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True)
    upper.plot(steps, [each["loss"] for each in metrics], color="tab:gray", linewidth=1)
    upper.set_yscale("log")
    upper.set_ylabel("training loss (nats per token)")
    checked = [each for each in metrics if any(name.startswith("exact_") for name in each)]
    sizes = [name for name in checked[-1] if name.startswith("exact_")] if checked else []
    for name in sizes:
        there = [each for each in checked if name in each]
        low, high = name.removeprefix("exact_").split("-")
        label = f"{low} definitions" if low == high else f"{low}-{high} definitions"
        shares = [each[name] for each in there]
        lower.plot([each["step"] for each in there], shares, marker=".", label=label)
    lower.set_ylabel("exact derivations (validation)")
    lower.set_xlabel("step")
    lower.set_ylim(-0.02, 1.02)
    lower.grid(alpha=0.3)
    if sizes:
        lower.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
