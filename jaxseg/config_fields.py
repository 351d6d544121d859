"""The vocabulary of an experiment: every field with its default and its meaning.

A file in `configs/` starts from `jaxseg.config.base_config` and states only what differs;
`config_checks` says what makes a config valid. The comments here are the reference that
`python -m jaxseg.main --help` prints: each is about the field on its line or, on lines of its own,
about the one that follows.

Augmentation defaults are those of nnU-Net v2 (Isensee et al. 2021) except translation, which
nnU-Net gets from its random crop.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "name": "",  # of the experiment; "" means that of the model
    "workdir": "",  # the run's folder; "" means runs/<name>
    "seed": 0,  # of initial weights and batches
    "data": {
        "dir": "",  # "" means the embedded demonstration cohort
        "cache_dir": "~/.cache/jaxseg",  # of prepared cases and of the demonstration cohort
        # Layout of data.dir: auto lets the folder tell; msd: Medical Segmentation Decathlon and
        # nnU-Net v1; nnunet: nnU-Net v2; images: pairs by pattern; table: cases.csv.
        "kind": "auto",
        "image_glob": "images/*",  # kind "images": where the images are; may hold {case} ...
        "other_channels": (),  # ... further channels of each, such as ("images/{case}_t2.nii.gz",)
        "label_pattern": "masks/{case}.png",  # ... and the label of each
        "class_names": ("background", "foreground"),  # where no dataset.json names them
        # Likewise the file value of each class; () means masks of 0 and one other value.
        "label_values": (),
        "objects": False,  # with label_values (): every value above 0 is an object of class 1
        "ignore_values": (),  # label values of voxels that count for nothing: no loss, no score
        "exclude": (),  # names of cases to leave out, or patterns such as "site3_*"
        "test_folder": False,  # kind "nnunet": imagesTs is the test set, or predicted if unlabelled
        "strict": False,  # refuse files that nothing lists, and images that are there twice
        "spacing_from": "pixdim",  # where a header contradicts itself: pixdim (as ITK) or sform
        "patch_size": (128, 128),  # voxels; two numbers train on slices, three on volumes
        "foreground_fraction": 0.33,  # of the patches that are drawn around a foreground voxel
        # These are the last of every batch, whose number is rounded, and not as the dice fall.
        "foreground_by_place": False,
    },
    # How fields that are None are decided, see configs/auto.py.
    "plan": {
        "preset": "",  # how large the network is; auto: nnunet, without an accelerator compact
        "configuration": "auto",  # slices or volumes; auto: as suits the data
        "file": "",  # decisions that jaxseg.plan wrote, in the place of new ones
        # GiB of each device, for which nnU-Net's presets are scaled; 0: a preset's own size, and
        # less where the device has less. What is compiled and does not fit is made smaller.
        "memory_gib": 0.0,
        # To plan for a device that is not here: XLA's description of a GPU (a .txtpb file) or a
        # slice of TPUs such as v5e:2x2.
        "target": "",
        # From command to evaluated network: train.num_steps are as many as fit. 0: as they are.
        "minutes": 0.0,
    },
    "split": {
        "seed": 0,  # of who is in which set, so that `seed` repeats a run on the same
        "file": "",  # JSON with lists of case ids, relative to data.dir
        "subject_regex": "",  # its first group is the subject; "" means a case is one
        "test_regex": "",  # cases that match are the test set
        "val_fraction": 0.15,  # of all subjects
        "test_fraction": 0.15,  # of all subjects
        "num_folds": 0,  # k > 1: val is fold `fold` of k
        "fold": 0,  # also which entry of a `file` that lists folds
    },
    "preprocess": {
        # () means the median spacing of the training cases, where slices keep the distance between
        # them; 0 leaves an axis as it is.
        "spacing_mm": (),
        # Which of the axes left-right, back-front and feet-head comes where; slices are cut across
        # the last. () means the thickest last for slices, and (0, 1, 2) for volumes.
        "axes": (),
        "image_order": 1,  # spline order of resampling: 1 linear, 3 cubic
        "label_order": 1,  # 1: linear resampling of one-hot labels, 0: nearest
        "crop": False,  # to the box of what is not 0 in every channel, and paste back
        # Of all channels, or of each with commas between them. auto: what the channel's name says;
        # zscore_inside: of what is not 0.
        "normalisation": "auto",
    },
    # Each transform is drawn with its probability, for each example.
    "augment": {
        "on": "host",  # or device: in the training step, of regions that the host reads
        "rotation": {
            "prob": 0.2,
            "range_deg": (-180.0, 180.0),
            "in_plane": False,  # of volumes: about the last axis alone
        },
        "translation": {"prob": 0.2, "range_fraction": (-0.1, 0.1)},  # of the patch
        "scaling": {"prob": 0.2, "range": (0.7, 1.4), "in_plane": False},  # all axes but the last
        "elastic": {
            "prob": 0.0,
            "spacing_voxels": 16,  # between control points
            "range_magnitude_voxels": (0.0, 4.0),
        },
        "flip": {"prob": 0.5, "axes": (0, 1)},  # none where left and right are classes
        "noise": {"prob": 0.1, "range_variance": (0.0, 0.1)},
        # channel_prob: of each channel by itself, once it is drawn; 0 draws one for all channels.
        "blur": {"prob": 0.2, "channel_prob": 0.0, "range_sigma_voxels": (0.5, 1.0)},
        "brightness": {"prob": 0.15, "range": (0.75, 1.25)},
        "contrast": {"prob": 0.15, "range": (0.75, 1.25)},
        "low_resolution": {"prob": 0.25, "channel_prob": 0.0, "range_zoom": (0.5, 1.0)},
        "gamma": {"prob": 0.3, "range": (0.7, 1.5)},
        "inverted_gamma": {"prob": 0.1, "range": (0.7, 1.5)},
    },
    "init": {
        "checkpoint": "",  # a run's folder, or a .safetensors, .npz or .pth file
        "strict": False,  # refuse weights of which anything does not fit
    },
    "loss": {
        "name": "dice_cross_entropy",
        "over_batch": False,  # Dice of the whole batch as of one large patch, not of each patch
        # Weigh gaps between touching cells (Ronneberger et al. 2015 take w0 = 10).
        "border_weight": {"w0": 0.0, "sigma_voxels": 5.0},
    },
    "optim": {
        "name": "adamw",
        "learning_rate": 2e-3,  # the highest; a list, [1e-3, 3e-3], trains one member for each
        "schedule": "polynomial",  # after the warm-up
        "warmup_steps": 50,  # over which the learning rate rises
        "weight_decay": 1e-2,
        "momentum": 0.99,  # sgd only, Nesterov
        "clip_norm": 12.0,  # global gradient norm; 0 means no clipping
        "accumulate_steps": 1,  # parts of the batch, one after the other, to save memory
        # (pattern, factor, first step): the first pattern that matches a parameter's path
        # scales its learning rate (0 freezes it) and says when it starts to move.
        "groups": (),
    },
    "train": {
        "num_steps": 1000,
        "batch_size": 16,  # global, whatever the number of devices
        "log_every": 25,  # steps
        "eval_every": 250,  # steps
        "checkpoint_every": 250,  # steps
        "keep_checkpoints": 2,  # the latest; the best is kept besides
    },
    "compile": {
        "cache_dir": "~/.cache/jaxseg/compiled",  # where the next start finds programs; "": none
    },
    "parallel": {
        "mode": "pmap",  # or shard_map: the same step, over a mesh with more axes
        "space": 1,  # devices that share a volume, along its first axis; shard_map only
        # Sum gradients of this many parts of the batch in one order, whatever the number of
        # devices, so that it changes no bit; 0 leaves the order to the devices.
        "virtual_shards": 0,
    },
    "ensemble": {
        "size": 1,  # members that differ in their seed: seed, seed + 1 ...
        "folds": 0,  # k: one member for each fold of a cross-validation
        "by": "map",  # members one after the other, to the bit as alone; or vmap
    },
    "predict": {
        "buffer_mib": 1024,  # most memory for overlapping tiles, whatever the volume
    },
}

# What differs for networks that are trained on volumes.
FIELDS_OF_VOLUMES = {
    "data.patch_size": (64, 64, 64),
    "augment.rotation.range_deg": (-30.0, 30.0),
    "augment.flip.axes": (0, 1, 2),
}

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": {
        "name": "unet",
        "features": (32, 64, 128, 256),  # one entry per resolution, finest first
        "encoder": "plain",  # residual; or vgg16, resnet18 ... for published weights
        "num_convs": (2,),  # per resolution, or one for all; blocks of a residual encoder
        "decoder_convs": 2,
        "kernel_sizes": (),  # per resolution a number or one per axis; () means 3
        "strides": (),  # per step down (and first convolution) a number or one per axis; () means 2
        "norm": "instance",
        "activation": "leaky_relu",
        "down": "conv",  # strided convolution or max_pool
        "up": "conv",  # transposed convolution or (linear) resize
        "padding": "same",  # valid: as published, logits cover the centre of the patch
        "attention": False,  # gates on the skip connections
        "deep_supervision": False,  # a loss at every resolution but the two coarsest
        "dropout": 0.0,
        "freeze_batch_stats": False,  # keep the statistics of the weights that it starts from
        "remat": False,  # less memory, more time
        "dtype": "float32",  # of the computation; parameters and loss stay float32
    },
    "fcn": {
        "name": "fcn",
        "encoder": "plain",  # or vgg16, as published; then features is ()
        "features": (16, 32, 64, 128, 256),  # after pool1 ... pool5 (strides 2 ... 32)
        "num_convs": 2,
        "norm": "instance",
        "activation": "relu",
        "head": "8s",
        "upsample": "learned",  # transposed convolution from bilinear weights, or fixed bilinear
        "padding": "same",  # paper: 100 zeros around the image and crops, for vgg16
        "dropout": 0.0,
        "freeze_batch_stats": False,
        "remat": False,
        "dtype": "float32",
    },
}

_NORMALISATIONS = ("auto", "ct", "zscore", "zscore_inside", "rescale_to_0_1", "rgb_to_0_1", "none")

CHOICES: dict[str, tuple[Any, ...]] = {
    "data.kind": ("auto", "msd", "nnunet", "images", "table"),
    "data.spacing_from": ("pixdim", "sform"),
    "plan.preset": ("", "auto", "compact", "nnunet", "resenc_m", "resenc_l", "resenc_xl"),
    "plan.configuration": ("auto", "2d", "3d_fullres", "3d_lowres"),
    "preprocess.normalisation": _NORMALISATIONS,
    "preprocess.image_order": (1, 3),
    "preprocess.label_order": (0, 1),
    "model.norm": ("instance", "batch", "group", "none"),
    "model.activation": ("relu", "leaky_relu"),
    "model.dtype": ("float32", "bfloat16"),
    "model.down": ("conv", "max_pool"),
    "model.up": ("conv", "resize"),
    "model.head": ("32s", "16s", "8s"),
    "model.upsample": ("learned", "fixed"),
    "augment.on": ("host", "device"),
    "loss.name": ("cross_entropy", "soft_dice", "dice_cross_entropy", "focal", "tversky"),
    "optim.name": ("sgd", "adamw", "muon"),
    "optim.schedule": ("constant", "polynomial", "cosine"),
    "parallel.mode": ("pmap", "shard_map"),
    "ensemble.by": ("map", "vmap"),
}

# Of these a field may hold one for each channel, with commas between them.
PER_CHANNEL = ("preprocess.normalisation",)

MODEL_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "model.encoder": ("plain", "residual", "vgg16", "resnet18", "resnet34", "resnet50"),
        "model.padding": ("same", "valid"),
    },
    "fcn": {"model.encoder": ("plain", "vgg16"), "model.padding": ("same", "paper")},
}

POSITIVE = (
    "data.patch_size",
    "augment.scaling.range",
    "augment.elastic.spacing_voxels",
    "augment.blur.range_sigma_voxels",
    "augment.low_resolution.range_zoom",
    "augment.gamma.range",
    "augment.inverted_gamma.range",
    "model.features",
    "model.num_convs",
    "loss.border_weight.sigma_voxels",
    "optim.learning_rate",
    "optim.accumulate_steps",
    "train.num_steps",
    "train.batch_size",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "parallel.space",
    "ensemble.size",
    "predict.buffer_mib",
)

NOT_NEGATIVE = (
    "preprocess.spacing_mm",
    "augment.elastic.range_magnitude_voxels",
    "augment.noise.range_variance",
    "optim.weight_decay",
    "optim.clip_norm",
    "loss.border_weight.w0",
    "plan.memory_gib",
    "plan.minutes",
    "parallel.virtual_shards",
    "ensemble.folds",
)

# Lists of whole numbers.
WHOLE = ("data.patch_size", "model.features", "model.num_convs")

# Resolutions of the encoders whose channels are published.
PUBLISHED_DEPTHS = {"vgg16": 5, "resnet18": 6, "resnet34": 6, "resnet50": 6}

# A resumed run may change these without becoming another experiment.
FREE_WHEN_RESUMING = (
    "workdir",
    # What the data are, their bytes say; not where they lie, or how they are found.
    "data.dir",
    "data.cache_dir",
    "data.kind",
    "data.image_glob",
    "data.other_channels",
    "data.label_pattern",
    "data.exclude",
    "data.strict",
    "train.log_every",
    "train.keep_checkpoints",
    "compile.cache_dir",
    "parallel.mode",
    "parallel.space",
    "predict.buffer_mib",
)
