"""support/launch.py -- before the loop of train.py: flags, and the model that a run starts from."""
import os
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from augment import CURRICULUM, Augmenter
from support import banks, checkpoint, cli, recipes, storage

def parse_config(config: type, argv: list[str]):
    """Flags over preset (with --resume: the run's configuration) over defaults -> a `config`."""
    flags = cli.FLAGS["train"]
    flags["preset"]["choices"], flags["mix"]["choices"] = recipes.PRESETS, [*recipes.MIXES, "none"]
    parser = cli.ArgumentParser().add_tables("train")
    parser.set_defaults(**recipes.PRESETS[parser.parse_args(argv).preset])
    first = parser.parse_args(argv)  # again: some presets name their --out
    saved = {}
    if first.resume:
        if not (storage.newest_step(first.out) / "state.pt").is_file():
            raise cli.UserError(f"nothing to resume in {first.out}: leave out --resume to start")
        saved = checkpoint.training_config(first.out) | dict(out=first.out)
        parser.set_defaults(**{k: saved.get(k, f.get("default")) for k, f in flags.items()})
    cfg = config(**vars(parser.parse_args(argv)))
    for name, f in flags.items():
        if "type" in f and getattr(cfg, name) in ("none", ""):
            setattr(cfg, name, None)
    for name in takewhile("out".__ne__, flags):  # those behind are the machine's
        was = saved.get(name, getattr(cfg, name))
        cli.refuse(getattr(cfg, name) != was, f"the run's --{name} was {was!r}: start another run")
    check(cfg)
    return cfg

def check(cfg) -> None:  # what the flags' own ranges cannot tell. Raises UserError
    for source in (cfg.noise, cfg.rooms) if stage_starts(cfg) or cfg.silence else ():
        banks.check_source(source)
    cli.check_out(cfg.out)
    for name in ("init_from", "encoder", "llm"):  # they may lie in --data_dir, too
        where = getattr(cfg, name)
        if where and cfg.data_dir and Path(cfg.data_dir, where).is_dir():
            setattr(cfg, name, str(Path(cfg.data_dir, where)))
    start, out = "" if cfg.resume else cfg.init_from or "", Path(cfg.out).resolve()
    cli.refuse(cfg.data_dir and not Path(cfg.data_dir).is_dir(), f"no folder at {cfg.data_dir}")
    cli.refuse(cfg.shard and (cfg.optimizer == "muon" or cfg.ctc),  # they want whole weights
               "--shard goes with --optimizer adamw and --ctc 0")
    cli.refuse(storage.steps_in(out) and not cfg.overwrite and not cfg.resume,
               f"{cfg.out} already holds a run: --resume, --overwrite or another --out")
    cli.refuse(start and Path(start).resolve().is_relative_to(out),
               f"--init_from {start} lies in --out: write into another folder")
    cli.refuse(start and cfg.train == "scratch", "--train scratch: leave out --init_from")

def stage_starts(cfg) -> list[float]:
    """--curriculum -> where in the run its four stages start, from 0 to 1. Raises UserError."""
    if cfg.curriculum == "none":
        return []
    with cli.as_user_error("--curriculum: none, or four ascending fractions from 0: ", ValueError):
        starts = [float(s) for s in cfg.curriculum.split(",")]
        if len(starts) != 4 or starts != sorted(starts) or starts[0] or not 0 <= starts[3] <= 1:
            raise ValueError(f"not {cfg.curriculum}")
    return starts

def make_augmenter(cfg, sounds: tuple, samples: int):
    """-> the Augmenter of --curriculum, whose fractions of the run become epochs, None for none."""
    epochs = cfg.steps * cfg.effective_batch / samples
    stages = [replace(stage, start_epoch=at * epochs)
              for at, stage in zip(stage_starts(cfg), CURRICULUM, strict=False)]
    return Augmenter(stages, *sounds, cfg.seed) if stages else None

def check_data(cfg, data: dict) -> None:
    """{pool: (samples, digest)}: a resumed run must find what it was started on, or UserError."""
    before = checkpoint.training_config(cfg.out).get("data", {}) if cfg.resume else {}
    for name, (samples, texts) in data.items():
        if name in before and before[name] != [samples, texts]:
            raise cli.UserError("the data has changed since the run was started, in "
                                f"{name} ({samples} rows, were {before[name][0]}): bring it back, "
                                "or start another run")

def load_start(cfg) -> checkpoint.Borealis:
    """What to train on, loaded; model.config.base names it for later. Raises UserError."""
    base = dict(checkpoint=None, encoder=cfg.encoder, llm=cfg.llm)
    parts = f"--init_from {cfg.init_from} --encoder {cfg.encoder} --llm {cfg.llm}"
    ways = "; or --init_from none: a new adapter; or --preset pretrain (tiny_pretrain) first"
    with cli.as_user_error(f"cannot start from {parts}: ", *checkpoint.ERRORS,
                           suffix=ways if cfg.init_from and not cfg.resume else ""):
        if cfg.resume:  # on what the run was started on, wherever its flags would point by now
            folder = storage.newest_step(cfg.out)
            config = checkpoint.read_config(folder)
            model = checkpoint.load_base(folder, config)
            model.config.base, model.tokenizer = config.base, checkpoint.load_tokenizer(folder)
            return model
        if cfg.init_from:
            place = checkpoint.find_checkpoint(cfg.init_from)
            model = checkpoint.load_checkpoint(place, cfg.encoder, cfg.llm)
            base |= dict(checkpoint=place if Path(cfg.init_from).exists() else cfg.init_from,
                         fingerprint=storage.fingerprint(place))
        else:
            model = checkpoint.from_parts(cfg.encoder, cfg.llm, adapter=cfg.adapter)
    here = Path(cfg.out, "step").resolve()  # as seen from the checkpoints: so all can move
    for key, where in base.items():
        if where and Path(where).exists():
            base[key] = os.path.relpath(Path(where).resolve(), here)
    model.config.base = base
    return model
