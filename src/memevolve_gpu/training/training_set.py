"""Training vectors of an index: rows of the store, and embedded sample texts where there are too few.

Samples are used for training only: they are never stored as units and never found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np

from ..errors import ConfigurationError, EmbeddingError, EngineError, InvalidVectorError
from ..types import FloatArray, Metric
from ..utils.vectors import check_vectors, normalize_rows


@dataclass(frozen=True, slots=True)
class Topic:
    """Phrases about one topic that fit into the sample sentences, six of each kind."""

    name: str
    activities: tuple[str, ...]
    failures: tuple[str, ...]
    techniques: tuple[str, ...]
    gains: tuple[str, ...]
    tools: tuple[str, ...]
    chores: tuple[str, ...]
    factors: tuple[str, ...]


_PHRASES = """
# technical
algorithm
    complexity analysis|edge case review|invariant checking|input profiling|proof reading|numeric range checking
    quadratic blowups|infinite loops|off-by-one errors|stack overflows|silent rounding loss|unstable orderings
    divide and conquer|memoised recursion|a sliding window|binary search|topological sorting|a priority queue
    linear running time|stable sorting|predictable memory|correct pagination|exact deduplication|fast lookups
    a complexity profiler|a property tester|a graph visualiser|an input fuzzer|a trace recorder|a scheduler model
    batch ranking|path planning|conflict resolution|record matching|queue balancing|interval merging
    exactness|recursion depth|lookup speed|memory footprint|approximation|preprocessing effort
development
    code review|dependency pinning|refactoring|type checking|small commits|interface design
    merge conflicts|dead code|circular imports|broken builds|hidden coupling|version drift
    feature flags|dependency injection|trunk based branching|semantic versioning|pair programming|a facade class
    readable modules|safe upgrades|shorter reviews|reusable components|clean interfaces|quick onboarding
    a code formatter|a changelog writer|a dependency updater|a template generator|a commit linter|an import sorter
    release notes|licence checks|stub generation|branch cleanup|schema migration|package publishing
    abstraction|simplicity|code reuse|delivery speed|backward compatibility|explicitness
performance
    load profiling|cache tuning|query planning|memory auditing|latency budgeting|connection pooling
    slow start-up|cache stampedes|memory leaks|tail latency spikes|lock contention|disk saturation
    request batching|lazy loading|index hints|zero-copy reads|work stealing|response compression
    steady throughput|low tail latency|smaller images|cheaper queries|warm caches|even load
    a flame graph viewer|a load generator|a cache inspector|a heap sampler|a query explainer|a latency dashboard
    capacity planning|regression detection|hot path discovery|cache warming|pool sizing|benchmark comparison
    throughput|latency|cache size|parallelism|data freshness|batch size
security
    key rotation|access review|input validation|patch management|threat modelling|secret scanning
    leaked credentials|injection attacks|privilege escalation|replayed requests|stale accounts|exposed backups
    least privilege|parameterised statements|token expiry|content signing|rate limiting|sandboxed execution
    auditable access|contained breaches|trusted builds|private logs|safe uploads|verified identities
    a secret scanner|a permission auditor|a certificate monitor|a policy checker|a log redactor|a token revoker
    certificate renewal|incident triage|vulnerability reports|account offboarding|policy enforcement|key escrow
    user convenience|strict isolation|audit detail|session length|privacy|recovery access
# conversational
queries
    intent clarification|question rephrasing|scope narrowing|context recall|follow-up planning|assumption checking
    wrong answers|endless clarification|ignored constraints|misread intent|repeated questions|lost context
    query decomposition|keyword expansion|a clarifying question|example elicitation|source ranking|slot filling
    relevant answers|shorter dialogues|complete requirements|precise retrieval|fewer corrections|clear intent
    a query rewriter|an intent classifier|a question router|a synonym list|a context tracker|an answer ranker
    request triage|question routing|search suggestions|dialogue summaries|frequent answers|feedback collection
    brevity|coverage|speed of reply|certainty|user guidance|open exploration
explanations
    example building|audience analysis|analogy testing|step numbering|jargon removal|summary writing
    confused readers|skipped steps|false confidence|misplaced detail|circular definitions|unanswered whys
    a worked example|a concrete analogy|progressive disclosure|a contrast case|a labelled diagram|plain wording
    lasting understanding|confident readers|traceable reasoning|shared vocabulary|quick recall|honest uncertainty
    a glossary builder|a diagram generator|a readability checker|an outline maker|an example bank|a source finder
    tutorial drafts|step by step guides|terminology checks|lesson plans|quiz generation|translation review
    depth|accessibility|rigour|entertainment|formality|completeness
concepts
    definition sharpening|model comparison|boundary testing|taxonomy upkeep|counterexample search|premise auditing
    category errors|vague terminology|overgeneralisation|false analogies|hidden premises|conflated causes
    first principles|a concept map|causal diagrams|thought experiments|dimensional reasoning|Socratic questioning
    transferable insight|consistent terms|sound judgement|testable hypotheses|simple theories|sharper distinctions
    a concept mapper|an ontology editor|an argument checker|a notes linker|a definition index|a belief tracker
    literature mapping|knowledge linking|hypothesis tracking|term extraction|argument review|idea clustering
    generality|precision|intuition|formal proof|novelty|shared convention
# practical
testing
    regression testing|fixture cleanup|mutation testing|coverage review|contract testing|seed recording
    flaky suites|untested branches|escaped defects|order dependence|brittle assertions|false alarms
    property based tests|fault injection|golden files|test doubles|snapshot comparison|boundary value analysis
    reproducible failures|fearless changes|fast feedback|isolated defects|trusted releases|measured coverage
    a test selector|a flake detector|a fixture factory|a coverage reporter|a mock server|a replay harness
    nightly test runs|failure triage|data seeding|browser checks|release sign-off|bug reproduction
    test isolation|realism|suite speed|coverage|maintenance effort|determinism
documentation
    runbook review|example testing|link checking|decision recording|glossary upkeep|screenshot renewal
    outdated guides|lost decisions|broken links|duplicated pages|tribal knowledge|misleading examples
    docs as code|architecture records|task oriented pages|executable examples|a style guide|a single source
    self-service support|searchable knowledge|faster handovers|accurate references|fewer tickets|quick lookups
    a link checker|a docs linter|an API reference builder|a page index|a change digest|a snippet runner
    reference updates|onboarding packs|page audits|version notices|meeting minutes|table of contents updates
    detail|scannability|freshness|authoring effort|a single voice|reader autonomy
deployment
    staged rollouts|backup drills|configuration review|image scanning|rollback rehearsal|capacity checks
    failed releases|configuration drift|prolonged outages|data loss|version skew|downtime at peak hours
    blue-green releases|canary traffic|immutable images|infrastructure as code|health gates|automatic rollback
    zero-downtime releases|repeatable environments|quick rollbacks|smaller blast radius|calm releases|known states
    a release pipeline|a rollback script|a drift detector|an image builder|a secrets injector|a migration runner
    environment setup|cluster upgrades|database migrations|artifact promotion|certificate rollout|cost reports
    release frequency|stability|automation|manual control|environment parity|infrastructure cost
monitoring
    alert review|log sampling|dashboard pruning|on-call handover|metric naming|incident review
    alert fatigue|silent failures|missing traces|unnoticed saturation|late detection|noisy dashboards
    distributed tracing|error budgets|anomaly detection|structured logging|synthetic probes|burn rate alerts
    early warning|short outages|explained incidents|meaningful alerts|visible trends|accountable services
    an alert router|a log parser|an uptime probe|a trace sampler|a status page|a metric exporter
    incident timelines|log rotation|service level reports|alert routing|health checks|trend summaries
    alert sensitivity|log volume|storage cost|diagnostic detail|sampling rate|quiet nights
"""
"""Each domain, its topics, and the phrases of each topic, one line for each field of :class:`Topic`."""


def _parsed(text: str) -> dict[str, tuple[Topic, ...]]:
    domains: dict[str, tuple[Topic, ...]] = {}
    for part in text.split("#")[1:]:
        domain, *lines = part.strip().splitlines()
        topics = [lines[start : start + 8] for start in range(0, len(lines), 8)]
        domains[domain] = tuple(
            Topic(name, *(tuple(line.strip().split("|")) for line in rest)) for name, *rest in topics
        )
    return domains


DOMAINS = _parsed(_PHRASES)

SETTINGS: dict[str, tuple[str, ...]] = {
    "technical": ("", "in web services", "in data pipelines", "in embedded devices", "in shared libraries"),
    "conversational": ("", "in customer support", "in classroom tutoring", "in research reviews", "with new users"),
    "practical": ("", "in small teams", "on legacy systems", "during incidents", "across several regions"),
}
"""Where it happens; may be empty."""


SAMPLE_TYPES = ("lesson", "skill", "tool", "abstraction")


def sample_texts(count: int, *, seed: int, proportions: Mapping[str, float] | None = None) -> list[str]:
    """Distinct texts of the four types, in random order.

    Each has the form of a unit's text: its content, then two tags and its type. The same arguments give the same texts,
    and a smaller ``count`` with the same seed and proportions gives a subset, so that embeddings can be cached.

    Args:
        count: number of texts.
        seed: of the selection.
        proportions: relative numbers of the types, such as the counts of types in a store; other types than the four
            are ignored. None, or none of the four, gives equal parts.

    Raises:
        ConfigurationError: ``count`` is negative or exceeds the available texts, or a proportion is not a finite
            number from 0 on.
    """
    if count < 0:
        raise ConfigurationError(f"count must not be negative, got {count}")
    shares = _shares(count, _weights(proportions))
    texts: list[str] = []
    for kind, share in shares.items():
        most = available_texts(kind)
        if share > most:
            raise ConfigurationError(f"count {count} asks for {share} texts of type {kind}; at most {most} exist")
        chosen = _generator(seed, kind).permutation(most)[:share]
        texts.extend(_text(kind, int(number)) for number in chosen)
    order = _generator(seed, "order").permutation(len(texts))
    return [texts[place] for place in order]


def available_texts(kind: str) -> int:
    """The number of distinct texts of a type."""
    return sum(_domain_size(kind, domain) for domain in DOMAINS)


def _weights(proportions: Mapping[str, float] | None) -> dict[str, float]:
    weights = {kind: float((proportions or {}).get(kind, 0.0)) for kind in SAMPLE_TYPES}
    for kind, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ConfigurationError(f"proportions[{kind!r}] must be a finite number from 0 on, got {weight}")
    return weights if sum(weights.values()) > 0 else dict.fromkeys(SAMPLE_TYPES, 1.0)


def _shares(count: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to ``count``; the differences of rounded running sums."""
    total = sum(weights.values())
    ends = [round(count * end / total) for end in accumulate(weights.values())]
    return {kind: end - start for kind, start, end in zip(weights, [0, *ends], ends, strict=False)}


def _generator(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


_SENTENCES = {
    "lesson": ("Regular {0} prevents {1}", "activities", "failures"),
    "skill": ("Use {0} to achieve {1}", "techniques", "gains"),
    "tool": ("Create {0} for {1} automation", "tools", "chores"),
    "abstraction": ("Balance between {0} and {1} enables {2}", "factors", "factors", "gains"),
}
"""The sentence of each type, and the field of :class:`Topic` for each of its gaps."""


def _text(kind: str, number: int) -> str:
    """The ``number``-th text of a type."""
    for domain in DOMAINS:
        if number < (size := _domain_size(kind, domain)):
            break
        number -= size
    number, place = divmod(number, len(SETTINGS[domain]))
    words, tags = [], []
    for choices in _choices(kind, domain):
        number, at = divmod(number, len(choices))
        words.append(choices[at][0])
        tags.append(choices[at][1])
    first, second = tags[0], tags[-1] if tags[-1] != tags[0] else domain
    sentence = _SENTENCES[kind][0].format(*words)
    return f"{' '.join(filter(None, (sentence, SETTINGS[domain][place])))} {first} {second} {kind}"


def _domain_size(kind: str, domain: str) -> int:
    return math.prod(map(len, _choices(kind, domain))) * len(SETTINGS[domain])


def _choices(kind: str, domain: str) -> list[list[tuple[str, str]]]:
    """For each gap of the sentence its phrases, each with the name of its topic.

    The two factors are of different topics, so that nothing is balanced against itself.
    """
    topics = DOMAINS[domain]
    halves = topics[: len(topics) // 2], topics[len(topics) // 2 :]
    return [
        [
            (phrase, topic.name)
            for topic in (halves[gap] if field == "factors" else topics)
            for phrase in getattr(topic, field)
        ]
        for gap, field in enumerate(_SENTENCES[kind][1:])
    ]


TrainingSource = Literal["existing", "hybrid", "service"]
Embed = Callable[[Sequence[str]], FloatArray]
"""Embeds n texts: (n, dim). May raise EmbeddingError."""
Progress = Callable[[str, float], None]
"""Called with ``samples`` and the finished fraction, 0 to 1; what it raises ends the collection."""

ENOUGH_EXISTING = 1000
ENOUGH_FOR_HYBRID = 100
HYBRID_TOTAL = 1500
SERVICE_TOTAL = 2000
MOST_EXISTING = 65_536
"""More vectors than any plan trains on."""
BATCH = 64
GIVE_UP_AFTER = 3
"""Consecutive failing batches after which no more are sent."""
_DIRECTION_ROWS = 2048


class SampleCache(Protocol):
    """Keeps embedded samples, so that no text is embedded twice."""

    def load(self) -> tuple[Sequence[str], FloatArray]:
        """All cached texts and their vectors (n, dim), in the same order; none where the model has changed."""
        ...  # pragma: no cover

    def save(self, texts: Sequence[str], vectors: FloatArray) -> None:
        """Add these; called after every batch."""
        ...  # pragma: no cover


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """Vectors float32 (m, dim) to train on, normalised under cosine, and their sources.

    m = existing + service + cached + fallbacks: rows of the store, samples embedded now, samples embedded before, and
    random vectors in place of samples that could not be embedded. Where ``usable`` is False the store must stay exact,
    and ``reason`` says why; ``error`` is the first error of the embedding function.
    """

    vectors: FloatArray
    source: TrainingSource
    existing: int = 0
    service: int = 0
    cached: int = 0
    fallbacks: int = 0
    usable: bool = True
    reason: str = ""
    error: str = ""


def source_for(count: int) -> TrainingSource:
    """What an index of ``count`` units is trained on: its own vectors from 1,000 on, vectors and samples from 100 on,
    samples alone below."""
    if count >= ENOUGH_EXISTING:
        return "existing"
    return "hybrid" if count >= ENOUGH_FOR_HYBRID else "service"


def samples_wanted(count: int) -> int:
    """The number of samples for ``count`` units: none, as many as make 1,500 in all, or 2,000."""
    return {"existing": 0, "hybrid": HYBRID_TOTAL - count, "service": SERVICE_TOTAL}[source_for(count)]


def existing_sample(vectors: FloatArray, limit: int, seed: int) -> FloatArray:
    """A seeded sample of at most ``limit`` rows (n, dim), in order; the same array where all fit."""
    if len(vectors) <= limit:
        return vectors
    return vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), limit, replace=False))]


def drawn_like(vectors: FloatArray, count: int, metric: Metric, seed: int) -> FloatArray:
    """Draws from the Gaussian with the mean and covariance of ``vectors`` (n, dim), n at least 2.

    Mixtures of centred rows have the sample's covariance without computing it. Normalised under cosine.
    """
    rng = np.random.default_rng(seed)
    base = existing_sample(vectors, _DIRECTION_ROWS, seed)
    mean = base.mean(axis=0)
    mixed = rng.standard_normal((count, len(base)), dtype=np.float32) @ (base - mean)
    drawn = np.asarray(mean + mixed / np.sqrt(len(base) - 1), dtype=np.float32)
    return np.ascontiguousarray(normalize_rows(drawn) if metric == "cosine" else drawn)


def collect(
    existing: FloatArray,
    *,
    metric: Metric,
    seed: int,
    embed: Embed | None = None,
    cache: SampleCache | None = None,
    proportions: Mapping[str, float] | None = None,
    progress: Progress | None = None,
    limit: int = MOST_EXISTING,
) -> TrainingSet:
    """Gather training vectors; where the embedding function fails, random vectors take the place of samples.

    Args:
        existing: the store's vectors, float32 (n, dim), normalised under cosine; n decides how many samples are needed.
        metric: l2, cosine or ip.
        seed: of the sample of existing vectors, the texts and the random vectors.
        embed: embeds a batch of texts; None where there is no embedding function.
        cache: texts embedded before; None embeds all of them.
        proportions: how often the store contains each type of unit.
        progress: called after every batch of texts.
        limit: most existing vectors to take.

    Raises:
        StorageError: the cache cannot be read or written.
    """
    source, dim = source_for(len(existing)), existing.shape[1]
    own = existing_sample(existing, limit, seed) if source != "service" else existing[:0]
    wanted = samples_wanted(len(existing))
    if not wanted:
        return TrainingSet(own, source, existing=len(own))
    samples = _Samples(dim, metric, cache)
    error = samples.fill(sample_texts(wanted, seed=seed, proportions=proportions), embed, progress)
    real = existing if len(existing) > 1 else samples.vectors
    missing = wanted - len(samples.vectors)
    fallbacks = drawn_like(real, missing, metric, seed) if missing and len(real) > 1 else existing[:0]
    reason = ""
    if 2 * missing > wanted:
        reason = f"{missing} of {wanted} training samples could not be embedded, more than half: {error}"
    return TrainingSet(
        vectors=np.concatenate([own, samples.vectors, fallbacks]),
        source=source,
        existing=len(own),
        service=samples.fresh,
        cached=samples.cached,
        fallbacks=len(fallbacks),
        usable=not reason,
        reason=reason,
        error=error,
    )


class _Samples:
    """Vectors of texts, cached ones first."""

    def __init__(self, dim: int, metric: Metric, cache: SampleCache | None) -> None:
        self._dim = dim
        self._metric: Metric = metric
        self._cache = cache
        self._pieces: list[FloatArray] = []
        self.cached = 0
        self.fresh = 0

    @property
    def vectors(self) -> FloatArray:
        """float32 (m, dim), normalised under cosine."""
        found = np.concatenate([np.empty((0, self._dim), np.float32), *self._pieces])
        return normalize_rows(found) if self._metric == "cosine" else found

    def fill(self, texts: Sequence[str], embed: Embed | None, progress: Progress | None) -> str:
        """Get the vectors of ``texts``; return the first error, empty where there was none."""
        missing = self._from_cache(texts)
        first_error = "" if embed or not missing else "there is no embedding function"
        failures = 0
        for start in range(0, len(missing) if embed else 0, BATCH):
            error = self._embed(missing[start : start + BATCH], embed)
            first_error = first_error or error
            failures = failures + 1 if error else 0
            if progress is not None:
                progress("samples", min(1.0, (start + BATCH) / len(missing)))
            if failures == GIVE_UP_AFTER:
                break
        return first_error

    def _from_cache(self, texts: Sequence[str]) -> list[str]:
        """Take the cached vectors; return the texts that are not cached."""
        kept, vectors = self._cache.load() if self._cache else ((), np.empty((0, self._dim), np.float32))
        if len(kept) != len(vectors) or vectors.shape[1:] != (self._dim,):
            return list(texts)
        rows = dict(zip(kept, range(len(kept)), strict=True))
        found = [rows[text] for text in texts if text in rows]
        self.cached = len(found)
        self._pieces.append(vectors[found])
        return [text for text in texts if text not in rows]

    def _embed(self, batch: list[str], embed: Embed | None) -> str:
        if embed is None:
            return ""
        try:
            vectors = check_vectors(embed(batch), self._dim, self._metric, name="embed(texts)")
            if len(vectors) != len(batch):
                return f"embed(texts) returned {len(vectors)} vectors for {len(batch)} texts"
        except (EmbeddingError, InvalidVectorError, EngineError) as error:
            return str(error)
        self._pieces.append(vectors)
        self.fresh += len(batch)
        if self._cache is not None:
            self._cache.save(batch, vectors)
        return ""
