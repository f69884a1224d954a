"""The trainer: a curriculum of problems, Muon and AdamW, checkpoints that resume exactly.

`raas-jax train configs/lemma.yaml` calls `main`. Every batch is a function of the seed and the
step, and the state holds everything else, so a run that was killed goes on to the same weights.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm

from raas_jax import arrays_on_disk, checks
from raas_jax.config import ModelConfig
from raas_jax.files import Fields, FileError
from raas_jax.lab.differences import differences
from raas_jax.lab.train.batches import Batch, batch
from raas_jax.lab.train.config import TrainConfig
from raas_jax.lab.train.export import export
from raas_jax.lab.train.forward import forward
from raas_jax.lab.train.metrics import AVERAGED, EVERY, Metrics, Scores
from raas_jax.model import init_weights

VERSION = 1
"""Of what a checkpoint says of itself."""
_REMEDY = "Remove this folder to go on from an earlier checkpoint, or give another one."
State = dict[str, Any]
"""A training state: `weights`, their `average` over steps, `optimizer`, `step` (int32, done)."""


def learning_rate(config: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up, constant, linear decay to zero."""

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = (step + 1) / config.warmup_steps
        fall = (config.steps - step) / max(1, config.steps - config.decay_from)
        return peak * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

    return rate


# Stacked matrices: which axes of [L, ...] a vector goes in by, and which it comes out by.
_MATRICES = {
    **dict.fromkeys("qkv", MuonDimensionNumbers((3,), (1, 2))),
    **dict.fromkeys(("o", "gate", "up", "down"), MuonDimensionNumbers((2,), (1,))),
}


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embedding and norms."""

    def dimensions(weights: Any) -> Any:
        named = dict.fromkeys(weights)
        return {**named, "layers": {name: _MATRICES.get(name) for name in weights["layers"]}}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        muon(
            learning_rate(config, config.matrix_learning_rate),
            adam_b2=0.95,
            adam_learning_rate=learning_rate(config, config.other_learning_rate),
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def loss_and_scores(
    config: ModelConfig, weights: Any, arrays: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy over derivation tokens, and how many of them are right.

    `exact` is the share of problems with every token right given the right ones before it, which
    is the share whose greedy derivation is exactly right.
    """
    tokens, scored, segments = arrays["tokens"], arrays["scored"], arrays["segments"]
    logits = forward(config, weights, tokens[:, :-1], arrays["positions"], segments)
    targets = tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    wrong = scored & (logits.argmax(-1) != targets)
    scored_float, count = scored.astype(jnp.float32), scored.sum().astype(jnp.float32)
    # A problem is told by its row and segment; the scored first token after a prompt counts it.
    most = 64
    rows = jnp.arange(tokens.shape[0])[:, None] * most + jnp.minimum(segments, most - 1)
    size = tokens.shape[0] * most
    problem_wrong = jnp.zeros(size, bool).at[rows].max(wrong)
    problem_there = jnp.zeros(size, bool).at[rows].max(scored)
    scores = {
        "loss": (losses * scored_float).sum() / count,
        "token_accuracy": 1 - wrong.sum().astype(jnp.float32) / count,
        "exact": 1 - problem_wrong.sum() / problem_there.sum(),
    }
    return scores["loss"], scores


def arrays_of(item: Batch) -> dict[str, Any]:
    """The arrays of a batch by name, for the compiled steps."""
    return {name: getattr(item, name) for name in ("tokens", "positions", "segments", "scored")}


def initial_state(config: TrainConfig) -> State:
    """The state before the first step."""
    weights = init_weights(config.model, jax.random.key(config.seed))
    # Sharper attention from the start: the look-ups come sooner.
    for name in ("q_norm", "k_norm"):
        weights["layers"][name] *= config.attention_scale
    return {
        "weights": weights,
        "average": jax.tree.map(jnp.copy, weights),
        "optimizer": optimizer(config).init(weights),
        "step": jnp.zeros((), jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    config: TrainConfig, state: State, arrays: dict[str, jax.Array]
) -> tuple[State, dict[str, jax.Array]]:
    """One step of the optimiser. The old state is donated: its buffers become the new one's."""
    gradient = jax.grad(functools.partial(loss_and_scores, config.model), has_aux=True)
    gradients, scores = gradient(state["weights"], arrays)
    # optax multiplies integer counts and broadcasts ranks, which strict callers forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, moments = optimizer(config).update(gradients, state["optimizer"], state["weights"])
    weights = optax.apply_updates(state["weights"], updates)
    # Early on the average follows quickly, so that the random beginning is forgotten.
    done = state["step"].astype(jnp.float32)
    decay = jnp.minimum(config.average_decay, (done + 1) / (done + 10))
    average = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, state["average"], weights
    )
    return {
        "weights": weights,
        "average": average,
        "optimizer": moments,
        "step": state["step"] + 1,
    }, scores


@functools.partial(jax.jit, static_argnums=0)
def score(config: ModelConfig, weights: Any, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The scores alone, compiled."""
    return loss_and_scores(config, weights, arrays)[1]


def validate(config: TrainConfig, weights: Any) -> dict[str, float]:
    """`exact` and `token_accuracy` on fixed problems of the validation split, by size."""
    result: dict[str, float] = {}
    for bucket in config.validation:
        item = batch(bucket, "validation", config.seed, 0)
        scores = score(config.model, weights, arrays_of(item))
        size = f"{bucket.smallest}-{bucket.largest}"
        result[f"exact_{size}"] = round(float(scores["exact"]), 4)
        result[f"token_accuracy_{size}"] = round(float(scores["token_accuracy"]), 6)
    return result


def train_steps(
    config: TrainConfig, state: State, until: int
) -> Iterator[tuple[State, dict[str, Any]]]:
    """Runs steps up to `until`, giving the state and the scores after each."""
    for step in range(int(state["step"]), until):
        bucket = config.bucket(step)
        item = batch(bucket, "train", config.seed, step)
        state, scores = train_step(config, state, arrays_of(item))
        yield state, {"step": step + 1, "size": bucket.largest, **scores}


def main(
    config_path: str,
    *,
    checkpoints: str | None = None,
    until: int | None = None,
    fresh: bool = False,
) -> Path:
    """Train as the YAML file says, going on from its newest checkpoint.

    Args:
      config_path: YAML file such as `configs/lemma.yaml`.
      checkpoints: folder to use in place of the config's.
      until: number of steps in all after which to stop; the config's `steps` by default.
      fresh: whether to refuse to resume, so that a folder with checkpoints is an error.

    Returns:
      The folder of checkpoints, with `metrics.jsonl` in it. Once the last step is done, the model
      lies beside it as a Hugging Face folder of the same name and `-model`.

    Raises:
      ValueError: a wrong configuration, or `fresh` and a folder with checkpoints.
    """
    config = TrainConfig.from_file(config_path)
    folder = Path(checkpoints or config.checkpoints).expanduser().absolute()
    if until is not None:
        checks.integer("until", until, 1)
    last = min(until or config.steps, config.steps)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        state, recent = initial_state(config), list[Scores]()
        if (step := manager.latest_step()) is not None:
            if fresh:
                raise ValueError(
                    f"checkpoints is {str(folder)!r}, which holds checkpoints; move it, or resume."
                )
            recent = _check_origin(manager, config, step)
            state = restore(manager, state, step)
        metrics, begin = Metrics(folder, int(state["step"]), recent), time.time()
        earlier = metrics.seconds
        with tqdm(total=last, initial=int(state["step"]), unit="step", mininterval=5) as bar:
            for now, scores in train_steps(config, state, last):
                step = int(scores["step"])
                metrics.count(scores)
                bar.update()
                if step % EVERY == 0 or step == last:
                    seconds, means = round(earlier + time.time() - begin, 1), metrics.means()
                    bar.set_postfix(loss=means["loss"], exact=means["exact"])
                    line = {"step": step, "seconds": seconds, **means}
                    if step % config.validate_every == 0 or step == last:
                        line |= validate(config, now["average"])
                    metrics.write(line)
                if step % config.checkpoint_every == 0 or step == last:
                    origin = _origin(config) | {"recent": metrics.settle()}
                    args = ocp.args.StandardSave(now)
                    manager.save(step, args=args, custom_metadata=origin)
                if step == config.steps:
                    export(config.model, now["average"], folder.with_name(f"{folder.name}-model"))
            manager.wait_until_finished()
    return folder


def _origin(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says of itself: the version of this, and all that decides the weights."""
    fields = dataclasses.asdict(config)
    for name in ("checkpoints", "checkpoint_every", "validate_every"):
        del fields[name]
    return {"version": VERSION, "config": json.loads(json.dumps(fields))}


def _check_origin(manager: ocp.CheckpointManager, config: TrainConfig, step: int) -> list[Scores]:
    """The scores of the steps before a checkpoint; none in one that does not say where it is from.

    Raises `FileError` for a checkpoint of a later version, or of another configuration.
    """
    folder = Path(manager.directory) / str(step)
    said = arrays_on_disk.read(folder, lambda: manager.metadata(step).custom_metadata, _REMEDY)
    found = Fields(said or {}, folder, remedy=_REMEDY)
    if not found.values:
        return []
    found.integer("version", 1, VERSION)
    there, here = dict(found.inner("config").values), _origin(config)["config"]
    if different := differences(there, here):
        raise FileError(
            folder,
            "is a checkpoint of another configuration; give another folder as checkpoints, or the "
            "same configuration. There → here:\n  " + "\n  ".join(different),
        )
    return [{name: each.real(name) for name in AVERAGED} for each in found.each("recent")]


def restore(manager: ocp.CheckpointManager, like: State, step: int | None = None) -> State:
    """A checkpoint, by default the newest, with the structure, shapes and dtypes of `like`.

    Raises `FileError` for one that is cut, or of another model.
    """
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    step = manager.latest_step() if step is None else step
    wanted = ocp.args.StandardRestore(target)
    folder = Path(manager.directory) / str(step)
    found: State = arrays_on_disk.read(folder, lambda: manager.restore(step, args=wanted), _REMEDY)
    return found


def export_checkpoint(
    config_path: str, folder: Path, *, checkpoints: str | None = None, step: int | None = None
) -> int:
    """Export the averaged weights of a checkpoint, by default the newest; gives its step."""
    config = TrainConfig.from_file(config_path)
    source = Path(checkpoints or config.checkpoints).expanduser().absolute()
    with ocp.CheckpointManager(source) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"checkpoints is {str(source)!r}, which holds none; train first.")
        state = restore(manager, initial_state(config), step)
    export(config.model, state["average"], folder)
    return step
