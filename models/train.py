"""Trains Latte, FVDM, S2DM, VDM or VideoFusion.

    python -m models.train --config models/configs/latte_s_digits.yaml --optim.lr 2e-4

`torchrun --nproc-per-node=N -m models.train ...` shares the same batch between N processes. A run writes to `run_dir`:

    config.yaml              the configuration
    metrics.jsonl            one line a step: loss, mse, vb, gradient norm, learning rate
    checkpoints/step_*.pt    model, EMA, optimiser, step and configuration; the newest `log.keep`
    tensorboard/             loss, gradient norm, learning rate, clips/s, memory, sample clips
    samples/step_*.{gif,png} sample clips of the EMA weights
    export/model.safetensors the EMA weights, when the last step is done

Started again, it goes on from the newest checkpoint, and its losses are those of a run that never stopped: every random
number, and the place in the data, follows from the seed and the step. A checkpoint that cannot be written (a full disk)
costs a warning, and training goes on to the next one; the older ones stay. With `--graph` the whole step is captured
into a CUDA graph at the third step and replayed: the host then launches next to nothing.
"""

import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.command_line import UsageError, one_line_errors, to_dict, to_yaml
from models.config import TrainConfig, parse_train_config
from models.data import VideoError
from models.sampling.codec import Codec, make_codec
from models.training import checkpointing
from models.training.data import Batches
from models.training.distributed import World, join_world
from models.training.export import export_weights
from models.training.metrics import Board, Metrics, NonFiniteError, warn
from models.training.optimizer import learning_rate
from models.training.samples import write_samples
from models.training.state import gather, gather_weights, scatter
from models.training.step import Run, make_run, train_step

PROG = "models.train"


def resume(run: Run) -> None:
    """Go on from the checkpoint that `resume` means, if there is one; a damaged newest one costs a warning."""
    checkpointing.remove_partial_files(run.checkpoints)
    choice = run.config.resume
    if choice == "never":
        return
    candidates = checkpointing.paths(run.checkpoints)[::-1] if choice == "auto" else [Path(choice)]
    for path in candidates:
        try:
            state = checkpointing.load(path)
        except checkpointing.StorageError as error:
            if path == candidates[-1]:
                raise
            run.tell(f"warning: {error}; it becomes .damaged and the run goes on from the one before")
            if run.world.is_main:
                path.rename(path.with_suffix(".damaged"))
            continue
        changed = scatter(state, run.model, run.ema, run.optimizer, run.config)
        run.step = state["step"]
        run.keys.load_state_dict({"key": torch.tensor([run.config.seed, run.step])})
        run.tell(f"going on after step {run.step} from {path}")
        if changed:
            run.tell(f"changed since: {', '.join(changed)}")
        return


def refuse_to_overtake(run: Run) -> None:
    """Raise UsageError where the run's folder holds checkpoints of later steps than the run begins at."""
    existing = checkpointing.paths(run.checkpoints)
    if existing and checkpointing.step_of(existing[-1]) > run.step:
        raise UsageError(
            f"{existing[-1]} is further than step {run.step}, where --resume {run.config.resume} begins: "
            "choose another --run_dir"
        )


def train(run: Run, batches: Batches, metrics: Metrics, codec: Codec | None) -> bool:
    """Train to the last step, showing samples where there is a codec.

    Returns whether the last checkpoint was written.
    """
    config, log, written = run.config, run.config.log, True
    real = batches.first(log.sample_clips) if codec is not None else None
    for x0, conditions in itertools.islice(batches.after(run.step), config.steps - run.step):
        metrics.record(train_step(run, x0, conditions), learning_rate(config.optim, run.step))
        last = run.step == config.steps
        checkpoint_due = last or run.step % log.checkpoint_every == 0
        samples_due = log.sample_every > 0 and (last or run.step % log.sample_every == 0)
        if checkpoint_due or samples_due or run.step % log.every == 0:
            metrics.flush()
        with metrics.clock_stopped():
            if checkpoint_due:
                written = save(run)
            if codec is not None and real is not None and samples_due:
                show_samples(run, codec, metrics.board, real)
    return written


def save(run: Run) -> bool:
    """Write a checkpoint. Where that fails say why and return False: training can go on."""
    state = gather(run.model, run.ema, run.optimizer, run.step, to_dict(run.config))
    if not run.world.is_main:
        return True
    try:
        checkpointing.save(run.checkpoints, run.step, state, run.config.log.keep)
    except checkpointing.StorageError as error:
        warn(f"{error}; the older checkpoints stay")
        return False
    return True


def show_samples(run: Run, codec: Codec, board: Board | None, real: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Draw and write sample clips; where they cannot be written say why."""
    try:
        write_samples(run.ema, codec, run.schedule, run.config, run.step, run.world, board, real)
    except OSError as error:
        warn(f"no sample clips of step {run.step}: {error.strerror or error}")


def export(run: Run) -> None:
    """Write the EMA weights as export/model.safetensors."""
    weights = gather_weights(run.ema)
    if run.world.is_main:
        path = Path(run.config.run_dir) / "export" / "model.safetensors"
        export_weights(path, weights, to_dict(run.config))
        run.tell(f"wrote {path}")


def set_up(config: TrainConfig, world: World) -> tuple[Run, Batches, Metrics]:
    """Build the run, or go on with it, and write its configuration."""
    batches = Batches(config, world)
    run = make_run(config, world)
    resume(run)
    refuse_to_overtake(run)
    run_dir = Path(config.run_dir)
    if world.is_main:
        with checkpointing.atomic_file(run_dir / "config.yaml") as temporary:
            temporary.write_text(to_yaml(config))
    if run.step >= config.steps:
        run.tell(f"all {config.steps} steps are done")
    metrics = Metrics(
        run_dir,
        world,
        run.step,
        config.steps,
        config.batch_size,
        every=min(config.log.every, config.steps),
    )
    return run, batches, metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 for a run that failed, 2 for a mistake of the caller."""
    with contextlib.ExitStack() as stack:
        with one_line_errors(PROG):
            config = parse_train_config(sys.argv[1:] if argv is None else argv)
            world = stack.enter_context(join_world(config.device))
            codec = make_codec(config, None, world.device) if config.log.sample_every else None
            run, batches, metrics = set_up(config, world)
        try:
            with contextlib.closing(metrics):
                written = train(run, batches, metrics, codec)
            export(run)
            if batches.skipped:
                run.tell(batches.skipped)
        except (NonFiniteError, checkpointing.StorageError, VideoError) as error:
            reason = str(error).splitlines()[-1]  # a loading worker's error comes with its traceback
            run.tell(f"error: {reason}; start it again to go on from the newest checkpoint in {run.checkpoints}")
            return 1
        except KeyboardInterrupt:
            run.tell(f"stopped in step {run.step + 1}; start it again to go on from the newest checkpoint")
            return 130
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
