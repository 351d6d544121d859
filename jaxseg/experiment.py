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
from jaxseg.train_state import create_train_states


@dataclasses.dataclass(frozen=True)
class Member:
    """What tells the networks apart that one run trains.

    Attributes:
      seed: of its initial weights and its batches.
      fold: of its split.
      learning_rate: the highest.
    """

    seed: int
    fold: int
    learning_rate: float


def kind_of_members(config):
    """Why a run has several members: "seeds", "folds" or "rates"; "single" if it has one."""
    if config.ensemble.size > 1:
        return "seeds"
    if config.ensemble.folds:
        return "folds"
    return "rates" if isinstance(config.optim.learning_rate, list | tuple) else "single"


def members_of(config):
    """The members that one run trains, as a tuple; each is what that run alone would train."""
    seed, fold, rate = config.seed, config.split.fold, config.optim.learning_rate
    if config.ensemble.folds:
        return tuple(Member(seed, fold, rate) for fold in range(config.ensemble.folds))
    rates = rate if isinstance(rate, list | tuple) else (rate,)
    return tuple(
        Member(seed + index, fold, rate) for rate in rates for index in range(config.ensemble.size)
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run knows of its data.

    Attributes:
      dataset: `jaxseg.data.cases.Dataset`.
      splits: for each member a dict from "train", "val", "test" to case ids.
      store: CaseStore.
      plan: preprocessing Plan.
      fingerprint: SHA-256 of the data.
    """

    dataset: cases.Dataset
    splits: tuple[dict, ...]
    store: builder.CaseStore
    plan: object
    fingerprint: str

    @property
    def split(self):
        """Of the first member."""
        return self.splits[0]

    def cases_of(self, set_name, member=0):
        """The cases that are "train", "val" or "test" of a member."""
        chosen = set(self.splits[member][set_name])
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
    cache_dir = builder.local_folder(config.data.cache_dir)
    try:
        dataset = find_dataset(config, cache_dir, log)
    except cases.DatasetProblems as problems:
        raise _with_content_problems(problems, log) from None
    splits_of = {fold: make_split(config, dataset, fold) for fold in _folds_of(config)}
    split = next(iter(splits_of.values()))
    if config.ensemble.folds:
        splits.check_folds(list(splits_of.values()))
    # Folds share one preparation, so none is measured on its own training cases alone.
    planned = split["train"] + (split["val"] if _cross_validates(config, dataset) else [])
    store, plan, fingerprint = builder.prepare(
        dataset,
        planned,
        cache_dir=os.path.join(cache_dir, "prepared"),
        progress=log.progress,
        border_weight=border_weight_of(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        barrier=parallel.barrier,
        **config.preprocess.to_dict(),
    )
    splits_of_members = tuple(splits_of[member.fold] for member in members_of(config))
    return Data(dataset, splits_of_members, store, plan, fingerprint)


def _folds_of(config):
    return sorted({member.fold for member in members_of(config)})


def _cross_validates(config, dataset):
    if config.split.file:
        return splits.lists_folds(os.path.join(dataset.root, config.split.file))
    return bool(config.split.num_folds or config.ensemble.folds)


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


def make_split(config, dataset, fold):
    """The train, val and test cases that `config.split` asks for."""
    options = config.split.to_dict() | {"fold": fold}
    file, regex = options.pop("file"), options.pop("subject_regex")
    case_ids = [case.case_id for case in dataset.cases]
    subject_of = splits.subject_from_regex(regex)
    if file:
        path = os.path.join(dataset.root, file)
        return splits.split_from_file(path, case_ids, subject_of=subject_of, fold=fold)
    options["num_folds"] = options["num_folds"] or config.ensemble.folds
    return splits.split_by_subject(case_ids, subject_of=subject_of, **options)


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


def load_initial_weights(config, states, log):
    """Puts the weights that `config.init` names into fresh TrainStates; says what fitted.

    Raises:
      WeightsProblem, TransferProblem: the file can not be read, or does not fit.
    """
    source = weights.read_weights(os.path.expanduser(config.init.checkpoint))
    loaded = []
    for state in states:
        target = {"params": state.params, "batch_stats": state.batch_stats}
        variables, report = transfer.adapt(source, target, strict=config.init.strict)
        loaded.append(state.replace(**variables))
    log.text(f"weights from {config.init.checkpoint}\n{report}")
    return loaded


def create_members(config, model, tx, image_shape, log=None):
    """Fresh members, stacked where there are several.

    Args:
      config: validated ConfigDict.
      model: from `create_model_for`.
      tx: from `create_tx`.
      image_shape: shape of one training image, (*S, C).
      log: where to say what came from `init.checkpoint`; None leaves that unread.
    Returns:
      (state, keys, learning_rates): TrainState and, for each member, the key of its steps and its
      learning rate.
    """
    members = members_of(config)
    init_keys, step_keys = zip(
        *(jax.random.split(jax.random.key(member.seed)) for member in members), strict=True
    )
    states = create_train_states(model, tx, init_keys, image_shape)
    if config.init.checkpoint and log is not None:
        states = load_initial_weights(config, states, log)
    rates = [jnp.float32(member.learning_rate) for member in members]
    if len(members) == 1:
        return states[0], step_keys[0], rates[0]
    return tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        for trees in (states, step_keys, rates)
    )


def loss_fn_for(config):
    """The loss that `config.loss` names."""
    return losses.LOSSES[config.loss.name]


def create_tx(config):
    """The optimiser that `config.optim` describes, for a learning rate of 1."""
    schedule = optim.create_schedule(
        config.optim.schedule,
        learning_rate=1.0,
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


def create_layout(config):
    """How devices share the work of a run.

    Raises:
      ConfigProblems: they can not.
    """
    try:
        return parallel.create_layout(
            config.parallel.mode, len(members_of(config)), config.parallel.space
        )
    except ValueError as error:
        raise config_lib.ConfigProblems([str(error)]) from None


def create_steps(config, model, tx, layout):
    """The training and the evaluation step, mapped over members and devices.

    Args:
      config: validated ConfigDict.
      model: from `create_model_for`.
      tx: from `create_tx`.
      layout: from `create_layout`.
    """
    axes = {"axis_name": parallel.AXIS_NAME}
    if config.parallel.space > 1:
        axes["space_axis"] = parallel.SPACE_AXIS
    on_devices = {"model": model.clone(**axes), "loss_fn": loss_fn_for(config), **axes}
    virtual_shards = config.parallel.virtual_shards
    train_step = functools.partial(
        steps.train_step,
        tx=tx,
        accumulate_steps=config.optim.accumulate_steps,
        virtual_shards=virtual_shards,
        **(on_devices | {"model": model} if virtual_shards else on_devices),
    )
    eval_step = functools.partial(steps.eval_step, **on_devices)
    if layout.has_members:
        train_step, eval_step = (
            steps.over_members(step, config.ensemble.by) for step in (train_step, eval_step)
        )
    return parallel.map_train_step(train_step, layout), parallel.map_eval_step(eval_step, layout)
