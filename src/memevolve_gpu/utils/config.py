"""Settings: keyword beats environment beats ``.env`` beats default.

The only module of the package that reads the environment and ``.env``. A setting is named after its variable: the
prefix is dropped and the rest is written in lower case, so ``MEMEVOLVE_STORAGE_TARGET_RECALL`` is ``target_recall``.
Variable names are compared without regard to case; an empty variable counts as not set.

Every value is validated when the configuration is made. A bad one raises ``ConfigurationError`` with the variable, the
value and what is allowed. Names that are not ours are ignored, because MemEvolve keeps its own settings in the same
places; an unknown ``MEMEVOLVE_STORAGE_*`` name is logged once, because it is most likely a typing error.
"""

from __future__ import annotations

import logging
import numbers
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args
from urllib.parse import quote, unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, NoDecode, SettingsConfigDict
from pydantic_settings import PydanticBaseSettingsSource as _Source

from ..errors import ConfigurationError
from ..types import JsonObject, Metric
from .arguments import shown, word

__all__ = [
    "Allowed",
    "EmbeddingConfig",
    "MilvusConfig",
    "StorageConfig",
    "gpu_order",
    "is_milvus_uri",
    "namespace_path",
    "serve_memevolve",
    "visible_gpus",
]

_log = logging.getLogger("memevolve_gpu.config")
_warned: set[str] = set()
_serves_memevolve = False

_Config = TypeVar("_Config", bound="_Settings")


def serve_memevolve(does: bool) -> None:
    """Record whether the drop-in is installed, so that MemEvolve makes the stores of this process."""
    global _serves_memevolve  # noqa: PLW0603 - a fact of the process, as the drop-in itself is
    _serves_memevolve = does


class Allowed(NamedTuple):
    """What a setting accepts, for error messages and documents, where it is not one of some words."""

    text: str


def _number(value: object) -> object:
    """Refuse booleans and unwrap NumPy's scalars."""
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _word(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http address")
    if parts.username or parts.password or parts.query:
        raise ValueError("no key or password belongs here")
    return value.rstrip("/")


def _mode(value: object) -> object:
    """A file mode as four octal digits: of a number as ``chmod`` takes it, or of digits with or without ``0o``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:04o}"
    return value.strip().lower().replace("0o", "").zfill(4) if isinstance(value, str) else value


MAX_PARTS, MAX_PART_CHARS = 16, 256
"""Of the path of a namespace."""
_NOT_IN_PARTS = re.compile(r"[/\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def namespace_path(value: object, name: str = "namespace") -> tuple[str, ...]:
    """The path of a namespace: a sequence of parts, or a text whose parts are separated by slashes; empty for the
    default namespace.

    Raises:
        ConfigurationError: it is no path, and what is wrong with it.
    """
    if value is None:
        return ()
    parts = value
    if isinstance(value, str):
        parts = value.strip("/").split("/") if value.strip("/") else ()
    if not isinstance(parts, (list, tuple)) or len(parts) > MAX_PARTS:
        raise ConfigurationError(f"{name} must be up to {MAX_PARTS} texts such as ('org', 'alice'), got {shown(value)}")
    for part in parts:
        if not isinstance(part, str) or not 0 < len(part) <= MAX_PART_CHARS or _NOT_IN_PARTS.search(part):
            raise ConfigurationError(
                f"{name}: each part must be a text of 1 to {MAX_PART_CHARS} characters without slashes and control "
                f"characters, got {shown(part)}; write ('org', 'alice') for org/alice"
            )
    return tuple(str.__str__(part) for part in parts)


def _path(value: object) -> object:
    try:
        return namespace_path(value)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


_Count = Annotated[int, BeforeValidator(_number), Field(ge=1), Allowed("a whole number of at least 1")]
_Natural = Annotated[int, BeforeValidator(_number), Field(ge=0), Allowed("a whole number of at least 0")]
_Share = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1), Allowed("a number above 0 and at most 1")]
_Switch = Annotated[bool, BeforeValidator(_word), Allowed("true or false")]
_Megabytes = Annotated[
    Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
    | Annotated[Literal["auto"], BeforeValidator(_word)],
    Allowed("a number above 0, or auto"),
]
_Seconds = Annotated[
    float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False), Allowed("a number of seconds above 0")
]
_Days = Annotated[float, BeforeValidator(_number), Field(ge=0, le=36_500), Allowed("a number of days from 0 to 36500")]
_IndexType = Annotated[Literal["flat", "ivf", "hnsw", "auto"], BeforeValidator(_word)]
_MetricName = Annotated[Metric, BeforeValidator(_word)]
_PrecisionName = Annotated[Literal["auto", "float32", "float16", "int8"], BeforeValidator(_word)]
_Device = Annotated[
    str,
    BeforeValidator(_word),
    Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"),
    Allowed("auto, cpu, cuda, or cuda:N with N the number of the device"),
]
_GpuEngine = Annotated[Literal["auto", "torch", "faiss"], BeforeValidator(_word)]
_Backend = Annotated[
    Literal["vector", "milvus"],
    BeforeValidator(lambda value: _word(value) if _word(value) == "milvus" else "vector"),
    Allowed("vector or milvus; MemEvolve's other words mean vector"),
]
_AutoPrune = Annotated[Literal["off", "lru", "lfu", "oldest"], BeforeValidator(_word)]
_Unicode = Annotated[Literal["nfc", "exact"], BeforeValidator(_word)]
_Stemming = Annotated[
    Annotated[str, Field(pattern=r"^[a-z]+$")] | None, Allowed("light, none, or a language such as german")
]
_Fields = Annotated[
    Annotated[str, Field(pattern=r"^[^,:]+(:\s*(number|text|time)\s*)?(,[^,:]+(:\s*(number|text|time)\s*)?)*$")] | None,
    Allowed("none, or paths with commas between them, each with :number, :text or :time after it or not"),
]
_Durability = Annotated[Literal["full", "normal"], BeforeValidator(_word)]
_FileMode = Annotated[
    str,
    BeforeValidator(_mode),
    Field(pattern=r"^06[0246]{2}$"),
    Allowed("octal digits as chmod takes them, the first 6, the others 0, 2, 4 or 6"),
]
_Provider = Annotated[Literal["auto", "openai", "local", "hashing"], BeforeValidator(_word)]
_Text = Annotated[Annotated[str, Field(min_length=1)] | None, Allowed("a text that is not empty")]
_Key = Annotated[Annotated[SecretStr, Field(min_length=1)] | None, Allowed("a text that is not empty")]
_Url = Annotated[
    Annotated[str, AfterValidator(_url)] | None,
    Allowed("an http:// or https:// address without user name, password or query"),
]
_Path = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(_path),
    Allowed("texts separated by slashes, such as org/alice; or empty"),
]
_Dimension = Annotated[_Count | None, Allowed("a whole number of at least 1")]


def _usable(file: Any) -> Any:
    """The default settings file; None, with a warning, if it is not a regular file or belongs to another user.

    The file decides where texts and keys are sent, so another user with access to the folder must not provide it. A
    file of root is accepted.
    """
    try:
        found = Path(file).stat()
    except (OSError, TypeError):
        return file
    if not stat.S_ISREG(found.st_mode):
        why = "is no regular file"
    elif found.st_uid not in (0, os.geteuid()):
        why = "belongs to another user"
    else:
        return file
    if (place := str(Path(file).resolve())) not in _warned:
        _warned.add(place)
        _log.warning("%s %s and is ignored; give its settings in the environment, or make it yours", place, why)
    return None


class _Found(NamedTuple):
    """A value, the name it was given under, and where that was."""

    value: Any
    name: str
    place: str


class _Settings(BaseSettings):
    """Base of the configurations: reads the sources of values and reports bad ones."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    prefix: ClassVar[str]
    """Start of every variable of this configuration."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Second name of a setting to its first."""
    borrowed: ClassVar[frozenset[str]] = frozenset()
    """Second names that are MemEvolve's own, with defaults that differ: in an object they are no choice."""
    follows: ClassVar[Mapping[str, str]] = {}
    """Setting to another that it must not be below: where it is not chosen, it rises with the other."""
    foreign: ClassVar[frozenset[str]] = frozenset()
    """Names that start like ours and are MemEvolve's own."""
    secret: ClassVar[frozenset[str]] = frozenset()
    """Settings whose value no message shows."""
    watched: ClassVar[bool] = False
    """Whether an unknown name with our prefix is worth a warning."""

    def __init__(self, **values: object) -> None:
        """Make a configuration from keywords, the environment and ``.env``.

        Args:
            values: settings by name or second name. ``_env_file`` names another file than ``.env`` in the current
                folder, or None for no file; ``_chosen`` the settings that count as chosen, all that are given unless
                it is there.

        Raises:
            ConfigurationError: a keyword is unknown, a value is not allowed, or ``.env`` cannot be read.
        """
        chosen = values.pop("_chosen", None)
        files = {"env_file": values.pop("_env_file")} if "_env_file" in values else {}
        found = self._from_variables(files) | self._from_keywords(values)
        try:
            super().__init__(_env_file=None, **{name: entry.value for name, entry in found.items()})
        except ValidationError as error:
            texts = dict.fromkeys(self._explain(row, found) for row in error.errors())
            raise ConfigurationError("; ".join(texts)) from None
        if chosen is not None:
            object.__setattr__(self, "__pydantic_fields_set__", chosen)
        self._let_follow()
        self._check_together()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: _Source, *_sources: _Source, **_named: _Source
    ) -> tuple[_Source, ...]:
        """Use the keywords only: ``__init__`` has already read the variables, with their places."""
        del settings_cls
        return (init_settings,)

    @classmethod
    def variables(cls) -> dict[str, str]:
        """List the environment variables.

        Returns:
            The setting's name for each variable, second names included.
        """
        names = {name: name for name in cls.model_fields} | dict(cls.aliases)
        return {cls.prefix + name.upper(): target for name, target in names.items()}

    @classmethod
    def allowed(cls, name: str) -> str:
        """Describe the values that a setting accepts.

        Args:
            name: name of a setting.

        Returns:
            A phrase, such as "a number above 0".

        Raises:
            ConfigurationError: There is no such setting.
        """
        word("name", name, cls.model_fields, ConfigurationError)
        field = cls.model_fields[name]
        *words, last = get_args(field.annotation) or ("",)
        said = f"{', '.join(map(str, words))} or {last}"  # of a Literal
        return next((mark.text for mark in field.metadata if isinstance(mark, Allowed)), said)

    @classmethod
    def adopt(cls: type[_Config], source: object = None) -> _Config:
        """Make a configuration of whatever the caller has.

        Args:
            source: None for environment and defaults; a configuration of this class, returned as it is; a mapping; or
                any object whose attributes are named like our settings, such as MemEvolve's own storage
                configuration. What is missing or None, and attributes that are no plain value, is left to the
                environment; other names are ignored, those of a mapping with a warning.

        Returns:
            The configuration.

        Raises:
            ConfigurationError: ``source`` is a text, a number or a sequence, or one of its values is not allowed.
        """
        if isinstance(source, cls):
            return source
        if source is None:
            return cls()
        if isinstance(source, Mapping):
            cls._warn_unknown({str(name).lower(): str(name) for name in source}, "", "the given mapping")
            return cls(**cls._values_of(source.get, object))
        if isinstance(source, (str, bytes, numbers.Number, list, tuple, set, frozenset, type)):
            raise ConfigurationError(
                f"{cls.__name__}: cannot be made of a {type(source).__name__}; give a {cls.__name__}, a mapping, or an "
                f"object with attributes such as {next(iter(cls.model_fields))}"
            )
        plain = (str, bool, numbers.Real, SecretStr)
        return cls(**cls._values_of(lambda name: cls._attribute(source, name), plain))

    def replace(self: _Config, **changes: object) -> _Config:
        """Return a copy with ``changes``, validated, without a second look at the environment.

        ``model_fields_set`` of the copy names what was chosen, then or now, and not what is a default.

        Args:
            **changes: new values by name of the setting.

        Returns:
            The copy.

        Raises:
            ConfigurationError: as the constructor does.
        """
        changes = {name: entry.value for name, entry in self._from_keywords(changes).items()}
        return type(self)(_env_file=None, _chosen=self.model_fields_set | set(changes), **(dict(self) | changes))

    @classmethod
    def _attribute(cls, source: object, name: str) -> object:
        """The attribute of a caller's object; None where a borrowed name only has the default of its class."""
        value = getattr(source, name, None)
        return None if name in cls.borrowed and value == getattr(type(source), name, None) else value

    @classmethod
    def _values_of(cls, get: Callable[[str], object], kinds: type | tuple[type, ...]) -> JsonObject:
        """Our settings in a caller's object, if they are of these types; a first name beats a second one."""
        names = {name: name for name in cls.model_fields} | dict(cls.aliases)
        found: JsonObject = {}
        for name, target in names.items():
            if (value := get(name)) is not None and isinstance(value, kinds):
                found.setdefault(target, value)
        return found

    @classmethod
    def _from_variables(cls, files: JsonObject) -> dict[str, _Found]:
        """Gather what ``.env`` and then the environment say; the environment wins."""
        file = files.get("env_file", _usable(cls.model_config["env_file"]))
        try:
            dotenv = DotEnvSettingsSource(cls, env_file=file).env_vars
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"{file}: cannot be read as UTF-8 settings ({error}); mend or remove it") from None
        found: dict[str, _Found] = {}
        for place, variables in ((f"in {file}", dotenv), ("in the environment", EnvSettingsSource(cls).env_vars)):
            stripped = {name.lower(): (value or "").strip() for name, value in variables.items()}
            # Second names come last in variables(), so that a first name in the same place is written over them.
            for variable, target in reversed(cls.variables().items()):
                if value := stripped.get(variable.lower()):
                    found[target] = _Found(value, variable, place)
            cls._warn_unknown({name: name.upper() for name in stripped}, cls.prefix, place)
        return found

    @classmethod
    def _from_keywords(cls, values: Mapping[str, object]) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        for name, value in values.items():
            target = cls.aliases.get(name, name)
            if target not in cls.model_fields:
                raise ConfigurationError(f"{name}: {cls.__name__} has no such setting{cls._nearest(name, '')}")
            if target in found:
                raise ConfigurationError(f"{', '.join(values)}: {target} is given twice; give it once")
            found[target] = _Found(value, name, f"variable {cls.prefix}{name.upper()}")
        return found

    @classmethod
    def _warn_unknown(cls, names: Mapping[str, str], prefix: str, place: str) -> None:
        """Log each name that starts with ``prefix`` and means nothing to us; once a process."""
        known = {prefix + name for name in (*cls.model_fields, *cls.aliases, *cls.foreign)}
        known = {name.lower() for name in known}
        for name, spelled in names.items():
            if not cls.watched or not name.startswith(prefix.lower()) or name in known or spelled in _warned:
                continue
            _warned.add(spelled)
            printable = spelled if spelled.isprintable() else repr(spelled)  # no line break, no surrogate
            _log.warning("%s (%s) is no known setting and is ignored%s", printable, place, cls._nearest(name, prefix))

    @classmethod
    def _nearest(cls, name: str, prefix: str) -> str:
        bare = name.lower().removeprefix(prefix.lower())
        near = get_close_matches(bare, [*cls.model_fields, *cls.aliases], n=1)
        return f"; did you mean {prefix + (near[0].upper() if prefix else near[0])}?" if near else ""

    @classmethod
    def _explain(cls, row: ErrorDetails, found: Mapping[str, _Found]) -> str:
        setting = str(row["loc"][0])
        value, name, place = found[setting]
        said = "..." if setting in cls.secret else shown(value)
        return f"{name}={said} ({place}): must be {cls.allowed(setting)}"

    def _let_follow(self) -> None:
        """Raise the defaults that follow a chosen setting."""
        for name, other in self.follows.items():
            if name not in self.model_fields_set:
                self.__dict__[name] = max(type(self).model_fields[name].default, getattr(self, other))

    def _check_together(self) -> None:
        """Refuse values that are fine alone and contradict each other."""


class StorageConfig(_Settings):
    """Settings of a store, ``MEMEVOLVE_STORAGE_*``; immutable. docs/reference/configuration.md describes each.

    Args:
        values: settings by name. One that is missing is read from the environment, then from ``.env``, and else has
            its default. ``_env_file`` names another file than ``.env``, or is None for no file.

    Raises:
        ConfigurationError: a name is unknown, a value is not allowed, two values contradict each other, or ``.env``
            cannot be read. The message says what is allowed.

    Examples:
        >>> from memevolve_gpu import StorageConfig
        >>> config = StorageConfig(index_type="hnsw", target_recall=0.98, _env_file=None)
        >>> config.replace(metric="cosine").metric
        'cosine'
    """

    # Written out in each class: the one that type checkers make up knows neither second names nor files.
    def __init__(self, **values: object) -> None:
        """Make a configuration; see the base class for ``values`` and errors."""
        super().__init__(**values)

    prefix: ClassVar[str] = "MEMEVOLVE_STORAGE_"
    aliases: ClassVar[Mapping[str, str]] = {
        "max_units": "max_memory_units",
        "enable_auto_retrain": "background",
        "min_training_vectors": "min_training_units",
    }
    borrowed: ClassVar[frozenset[str]] = frozenset({"enable_auto_retrain", "min_training_vectors"})
    follows: ClassVar[Mapping[str, str]] = {"prune_threshold": "warning_threshold"}
    foreign: ClassVar[frozenset[str]] = frozenset({"path", "vector_dim"})
    watched: ClassVar[bool] = True

    max_memory_units: _Count = 50_000
    """Most live units; a store beyond it is refused."""
    warning_threshold: _Share = 0.8
    """Share of a limit at which health warns."""
    prune_threshold: _Share = 0.9
    """Share of a limit at which management should prune."""
    prune_target: _Share = 0.7
    """Share of the unit limit to which ``auto_prune`` goes down."""
    auto_prune: _AutoPrune = "off"
    """Whether a write that reaches the prune threshold deletes other units, and which go first."""
    max_memory_mb: _Megabytes = 2048.0
    """Most host memory of codes, maps, masks and the vectors that are not mapped from a file, in MiB; ``auto`` takes
    what the host allows."""
    performance_threshold: _Count = 10_000
    """Number of units from which speed deserves attention; nothing acts on it yet."""
    adaptive_nlist: _Switch = True
    """Whether nlist follows the number of units; otherwise that of the index in use is kept."""
    vectors_per_centroid: _Count = 39
    """Vectors wanted in each IVF list."""
    nlist_min: _Count = 10
    """Fewest IVF lists."""
    nlist_max: _Count = 256
    """Most IVF lists."""
    min_training_units: _Natural = 1_000
    """Number of units below which nothing is trained and an exact scan answers."""
    index_type: _IndexType = "ivf"
    """Kind of index once there is enough to train on."""
    metric: _MetricName = "l2"
    """Distance: squared L2, 1 - cosine, or negative dot product."""
    target_recall: _Share = 0.95
    """Recall that a search must reach against an exact scan."""
    precision: _PrecisionName = "auto"
    """Number format of the rows on a GPU; float32 decides, and the CPU searches nothing else."""
    device: _Device = "auto"
    """Where searches run."""
    gpu_engine: _GpuEngine = "auto"
    """What searches on a GPU; ``auto`` takes torch, and faiss where torch cannot be used."""
    gpu_max_memory_mb: _Megabytes = "auto"
    """Most memory of the index on a GPU, in MiB; ``auto`` takes what GPU_MEMORY_FRACTION allows."""
    gpu_memory_fraction: _Share = 0.8
    """Share of the GPU memory that is free or ours which the stores of this process may take together."""
    gpu_graphs: _Switch = False
    """Whether single queries of the torch engine are recorded as CUDA graphs."""
    indexed_fields: _Fields = None
    """Fields that the file keeps an index of, so that the first filter on them is quick; None keeps those it has."""
    filter_unicode: _Unicode = "nfc"
    """Whether filters compare texts in Unicode's composed form, or as they are."""
    keyword_stemming: _Stemming = None
    """How keyword search treats the forms of a word; None keeps what the file has, ``light`` where it is new."""
    durability: _Durability = "full"
    """``full`` syncs before a write is acknowledged; ``normal`` may lose the last writes when power fails."""
    lock_timeout: _Seconds = 30.0
    """Seconds that a write waits for other writers of the store before it fails; searches never wait for them."""
    file_mode: _FileMode = "0600"
    """Who may read and write the files of a new store, as ``chmod`` takes it; a store that exists keeps its mode."""
    sample_queries: _Switch = True
    """Whether a bounded sample of query vectors is kept to calibrate the index on what is really asked."""
    history_days: _Days = 7.0
    """Days for which replaced and deleted versions of units are kept; 0 keeps none."""
    background: _Switch = True
    """Whether a thread of the store builds, retrains and heals the index by itself."""
    backend_type: _Backend = "vector"
    """Where the units are: in files of this package, or on a Milvus server."""
    namespace: _Path = ()
    """The namespace of the store that is opened; empty for the default one."""

    @classmethod
    def adopt(cls, source: object = None) -> StorageConfig:
        """As in the base class; a store that MemEvolve makes prunes by itself where MemEvolve is told to manage.

        That is ``auto_prune="lru"`` unless it was chosen, under the drop-in, for what is no configuration or mapping of
        our users, with MEMEVOLVE_MANAGEMENT_ENABLE_AUTO_MANAGEMENT on in the environment or ``.env``.

        Args:
            source: what the caller has; see the base class.

        Returns:
            The configuration.
        """
        config = super().adopt(source)
        ours = isinstance(source, (StorageConfig, Mapping)) or "auto_prune" in config.model_fields_set
        if ours or not (_serves_memevolve and cls._memevolve_manages()):
            return config
        return config.replace(auto_prune="lru")

    @classmethod
    def _memevolve_manages(cls) -> bool:
        file = _usable(cls.model_config["env_file"])
        for variables in (EnvSettingsSource(cls).env_vars, DotEnvSettingsSource(cls, env_file=file).env_vars):
            for name, value in variables.items():
                if name.lower() == "memevolve_management_enable_auto_management" and value:
                    return value.strip().lower() in ("true", "1", "yes", "on")
        return False

    def _let_follow(self) -> None:
        super()._let_follow()
        if "prune_target" not in self.model_fields_set:
            self.__dict__["prune_target"] = min(type(self).model_fields["prune_target"].default, self.prune_threshold)

    def _check_together(self) -> None:
        pairs = [("warning_threshold", "prune_threshold"), ("nlist_min", "nlist_max")]
        for low, high in [*pairs, ("prune_target", "prune_threshold")]:
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise ConfigurationError(
                    f"{self.prefix}{low.upper()}={shown(least)} must not exceed "
                    f"{self.prefix}{high.upper()}={shown(most)}; lower the first or raise the second"
                )


class EmbeddingConfig(_Settings):
    """Settings of the embedding function, ``MEMEVOLVE_EMBEDDING_*``, shared with MemEvolve; immutable.

    Args:
        values: settings by name, as for :class:`StorageConfig`.

    Raises:
        ConfigurationError: as for :class:`StorageConfig`. Keys and addresses are not shown in messages.

    Examples:
        >>> from memevolve_gpu import EmbeddingConfig
        >>> EmbeddingConfig(provider="hashing", dimension=64, _env_file=None).dimension
        64
    """

    def __init__(self, **values: object) -> None:
        """Make a configuration; see the base class for ``values`` and errors."""
        super().__init__(**values)

    prefix: ClassVar[str] = "MEMEVOLVE_EMBEDDING_"
    secret: ClassVar[frozenset[str]] = frozenset({"api_key", "base_url"})

    provider: _Provider = "auto"
    """Who embeds: a service with OpenAI's interface, a local model, or the hashing stand-in for tests and demos."""
    base_url: _Url = None
    """Address of the service."""
    api_key: _Key = None
    """Key for the service; never shown."""
    model: _Text = None
    """Name of the model."""
    timeout: _Seconds = 60.0
    """Seconds that one request may take."""
    dimension: _Dimension = None
    """Length of the vectors; asked of the embedding function when not set."""
    batch_size: _Dimension = None
    """Most texts that go to the service or through the local model at once."""
    max_tokens: _Dimension = None
    """Most tokens of one text for the service, by estimate."""
    path: _Text = None
    """An ONNX file for the local model, or its folder; nothing is downloaded."""


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES as it stands: which GPUs CUDA will show to this process, and in which order; None for all.

    The driver's own lists ignore it, so their readers must apply it.
    """
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def may_download() -> bool:
    """Whether HF_HUB_OFFLINE, the variable of Hugging Face's packages, does not forbid downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "on", "yes", "true")


def no_telemetry() -> None:
    """Keep onnxruntime from reporting to its makers, unless the user decided: called before its first import.

    From version 1.29 on it tells them of the machine and of each model, in a thread on which a forked child waits for
    ever at its end.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def fastembed_cache() -> Path:
    """Where fastembed keeps the models that it downloaded: FASTEMBED_CACHE_PATH, else its default."""
    return Path(os.environ.get("FASTEMBED_CACHE_PATH") or Path(tempfile.gettempdir(), "fastembed_cache"))


def gpu_order() -> str | None:
    """CUDA_DEVICE_ORDER as it stands: how CUDA numbers GPUs; None for its default, the fastest first."""
    return os.environ.get("CUDA_DEVICE_ORDER")


_SCHEMES = {"milvus": "http", "milvus+http": "http", "milvus+https": "https"}
_PORT = 19530

_ServerUrl = Annotated[
    str, AfterValidator(_url), Allowed("an http:// or https:// address without user name, password or query")
]
_Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$"),
    Allowed("letters, digits and _, no digit first, at most 255 characters"),
]
_Consistency = Annotated[Literal["session", "strong", "bounded", "eventually"], BeforeValidator(_word)]


class MilvusConfig(_Settings):
    """Settings of ``MilvusStore``, ``MEMEVOLVE_MILVUS_*``; immutable. See docs/how-to/milvus.md.

    Args:
        values: settings by name, as for :class:`StorageConfig`.

    Raises:
        ConfigurationError: as for :class:`StorageConfig`. Token and address are not shown in messages.

    Examples:
        >>> from memevolve_gpu.utils.config import MilvusConfig
        >>> MilvusConfig(uri="https://db.example.org:19530", collection="notes", _env_file=None).address
        'milvus+https://db.example.org:19530/notes'
    """

    def __init__(self, **values: object) -> None:
        """Make a configuration; see ``StorageConfig`` for ``values`` and errors."""
        super().__init__(**values)

    prefix: ClassVar[str] = "MEMEVOLVE_MILVUS_"
    aliases: ClassVar[Mapping[str, str]] = {}
    secret: ClassVar[frozenset[str]] = frozenset({"token", "uri"})

    uri: _ServerUrl = "http://localhost:19530"
    """Address of the server."""
    token: _Key = None
    """``user:password`` or an API key; never shown."""
    database: _Text = None
    """Name of the database on the server; its default one when not set."""
    collection: _Name = "memevolve"
    """Name of the collection that is the store."""
    consistency: _Consistency = "session"
    """Which writes a search waits for."""
    shards: _Count = 1
    """Shards of a new collection: how many writers work side by side."""
    replicas: _Count = 1
    """Copies in memory, each on query nodes of its own."""
    timeout: _Seconds = 30.0
    """Seconds after which a call gives up, retries included."""

    @classmethod
    def at(cls, uri: str) -> MilvusConfig:
        """Settings for ``milvus://host:port/collection`` (``milvus+https://`` for TLS), the rest from the environment.

        Raises:
            ConfigurationError: the address or the collection's name cannot be used.
        """
        parts = urlsplit(uri)
        if parts.scheme not in _SCHEMES or not parts.hostname or parts.username or parts.query:
            raise ConfigurationError(
                f"{parts.scheme}://...: write milvus://host:port/collection, or milvus+https:// for TLS; "
                "the token goes into MEMEVOLVE_MILVUS_TOKEN"
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        name = unquote(parts.path.strip("/"))
        named = {"collection": name} if name else {}
        return cls().replace(uri=f"{_SCHEMES[parts.scheme]}://{host}:{parts.port or _PORT}", **named)

    @property
    def address(self) -> str:
        """The store as :meth:`at` takes it."""
        parts = urlsplit(self.uri)
        scheme = "milvus+https" if parts.scheme == "https" else "milvus"
        return f"{scheme}://{parts.netloc}/{quote(self.collection)}"

    @property
    def secret_token(self) -> str:
        """The token in the clear, "" when there is none."""
        return self.token.get_secret_value() if isinstance(self.token, SecretStr) else ""


def is_milvus_uri(place: object) -> bool:
    """Does this name a store on a Milvus server, rather than a path?"""
    return isinstance(place, str) and place.split("://", 1)[0] in _SCHEMES and "://" in place
