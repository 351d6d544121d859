"""From a config to what it describes: the data, the network, the optimiser. Configs stop here."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from jaxseg import config as config_lib
from jaxseg import losses, optim, parallel, program, steps, transfer, weights
from jaxseg.data import builder, cases, demo, splits
from jaxseg.data.verify import verify
from jaxseg.models import create_model


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run knows of its data.

    Attributes:
      dataset: `jaxseg.data.cases.Dataset`.
      split: dict from "train", "val", "test" to case ids.
      store: CaseStore.
      plan: preprocessing Plan.
      fingerprint: SHA-256 of the data.
    """

    dataset: cases.Dataset
    split: dict
    store: builder.CaseStore
    plan: object
    fingerprint: str

    def cases_of(self, set_name):
        """The cases of "train", "val" or "test"."""
        chosen = set(self.split[set_name])
        return [case for case in self.dataset.cases if case.case_id in chosen]

    @property
    def num_channels(self):
        return len(self.plan.normalisation)

    @property
    def num_classes(self):
        return len(self.dataset.class_names)


def workdir_of(config):
    """The run's folder as an absolute path."""
    return os.path.abspath(os.path.expanduser(config.workdir or os.path.join("runs", config.name)))


def load_data(config, log):
    """Finds the dataset, splits it by subject, prepares it or finds it prepared.

    Args:
      config: validated ConfigDict.
      log: `jaxseg.writers.RunLog`.
    Raises:
      DatasetProblems, SplitProblem, OSError: the data can not be used.
    """
    cache_dir = os.path.expanduser(config.data.cache_dir)
    try:
        dataset = find_dataset(config, cache_dir, log)
    except cases.DatasetProblems as problems:
        raise _with_content_problems(problems, log) from None
    split = make_split(config, dataset)
    store, plan, fingerprint = builder.prepare(
        dataset,
        split["train"],
        cache_dir=os.path.join(cache_dir, "prepared"),
        progress=log.progress,
        border_weight=border_weight_of(config),
        **config.preprocess.to_dict(),
    )
    return Data(dataset, split, store, plan, fingerprint)


def _with_content_problems(missing, log):
    """Adds what is wrong inside the files that are there, so that all is reported at once."""
    if missing.found is None:
        return missing
    try:
        verify(missing.found, progress=functools.partial(log.progress, title="verifying"))
    except cases.DatasetProblems as wrong:
        return cases.DatasetProblems(missing.problems + wrong.problems)
    return missing


def find_dataset(config, cache_dir, log):
    """The dataset in `data.dir`, or the demonstration cohort, made in `cache_dir` when missing."""
    if not config.data.dir:
        log.text(
            "no --config.data.dir: training on the embedded demonstration cohort (brain tissue, "
            "deformed from the MNI152 templates). A first run, not evidence of quality."
        )
        folder = os.path.join(cache_dir, "demo_brain")
        progress = functools.partial(log.progress, title="making the cohort")
        return cases.find_msd_cases(demo.create_demo_cohort(folder, progress=progress))
    root = os.path.abspath(os.path.expanduser(config.data.dir))
    if config.data.kind == "msd":
        return cases.find_msd_cases(root)
    return cases.find_image_cases(
        root,
        config.data.image_glob,
        config.data.label_pattern,
        tuple(config.data.class_names),
        tuple(config.data.label_values) or None,
    )


def make_split(config, dataset):
    """The train, val and test cases that `config.split` asks for."""
    options = config.split.to_dict()
    file, regex = options.pop("file"), options.pop("subject_regex")
    case_ids = [case.case_id for case in dataset.cases]
    subject_of = splits.subject_from_regex(regex)
    if file:
        path = os.path.join(dataset.root, file)
        return splits.split_from_file(path, case_ids, subject_of=subject_of, fold=config.split.fold)
    return splits.split_by_subject(case_ids, seed=config.seed, subject_of=subject_of, **options)


def create_model_for(config, num_classes):
    """The network that `config.model` describes."""
    return create_model(config.model.name, num_classes, **config_lib.model_options(config))


def border_weight_of(config):
    """Options of the border-weight map, or None when it is not wanted."""
    weight = config.loss.border_weight
    return {"w0": weight.w0, "sigma": weight.sigma_voxels} if weight.w0 > 0 else None


def margin_of(config):
    """Voxels at each side of the patch that the network sees but does not label, one per axis.

    Raises:
      ConfigProblems: a network without padding can not take such a patch.
    """
    patch_size = tuple(config.data.patch_size)
    model = create_model_for(config, 2)
    image = jax.ShapeDtypeStruct((1, *patch_size, 1), jnp.float32)
    try:
        logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    except ValueError as error:
        raise config_lib.ConfigProblems([f"data.patch_size {patch_size}: {error}"]) from None
    lost = [n - m for n, m in zip(patch_size, logits.shape[1:-1], strict=True)]
    if any(n % 2 for n in lost):
        raise config_lib.ConfigProblems(
            [
                f"data.patch_size {patch_size}: logits {logits.shape[1:-1]} do not lie in its "
                "centre; use odd kernels, or a patch that is one voxel larger"
            ]
        )
    return tuple(n // 2 for n in lost)


def check_initial_weights(config):
    """Raises WeightsProblem if there is nothing where `config.init` looks for weights."""
    path = os.path.expanduser(config.init.checkpoint)
    if path and not os.path.exists(path):
        weights.read_weights(path)


def load_initial_weights(config, state, log):
    """Puts the weights that `config.init` names into a fresh TrainState; says what fitted.

    Raises:
      WeightsProblem, TransferProblem: the file can not be read, or does not fit.
    """
    source = weights.read_weights(os.path.expanduser(config.init.checkpoint))
    target = {"params": state.params, "batch_stats": state.batch_stats}
    variables, report = transfer.adapt(source, target, strict=config.init.strict)
    log.text(f"weights from {config.init.checkpoint}\n{report}")
    return state.replace(**variables)


def loss_fn_for(config):
    """The loss that `config.loss` names."""
    return losses.LOSSES[config.loss.name]


def create_tx(config):
    """The optimiser that `config.optim` describes."""
    schedule = optim.create_schedule(
        config.optim.schedule,
        learning_rate=config.optim.learning_rate,
        num_steps=config.train.num_steps,
        warmup_steps=config.optim.warmup_steps,
    )
    return optim.create_optimizer(
        config.optim.name,
        schedule,
        weight_decay=config.optim.weight_decay,
        momentum=config.optim.momentum,
        clip_norm=config.optim.clip_norm,
        groups=config.optim.groups,
    )


def create_recipe(config, plan, class_names, margin, **options):
    """How whole volumes are predicted.

    Args:
      config: validated ConfigDict.
      plan: preprocessing Plan.
      class_names: of all classes, background first.
      margin: of `margin_of`.
      **options: fields of `jaxseg.program.Recipe` that are chosen after training.
    """
    return program.Recipe(
        model=create_model_for(config, len(class_names)),
        class_names=tuple(class_names),
        patch_size=tuple(config.data.patch_size),
        margin=margin,
        batch_size=max(config.train.batch_size // jax.local_device_count(), 1),
        spacing_mm=plan.spacing_mm,
        image_order=plan.image_order,
        statistics=plan.intensity,
        buffer_bytes=config.predict.buffer_mib << 20,
        **options,
    )


def create_steps(config, model, tx):
    """The training and the evaluation step, mapped over all devices.

    Args:
      config: validated ConfigDict.
      model: from `create_model_for`.
      tx: from `create_tx`.
    """
    options = {
        "model": model.clone(axis_name=parallel.AXIS_NAME),
        "loss_fn": loss_fn_for(config),
        "axis_name": parallel.AXIS_NAME,
    }
    accumulate_steps = config.optim.accumulate_steps
    train_step = functools.partial(
        steps.train_step, tx=tx, accumulate_steps=accumulate_steps, **options
    )
    eval_step = functools.partial(steps.eval_step, **options)
    return parallel.pmap_train_step(train_step), parallel.pmap_eval_step(eval_step)
