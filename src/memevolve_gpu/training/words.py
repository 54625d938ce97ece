"""The words that service sample texts are made of: what agents learn about, by domain and topic."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DOMAINS", "SETTINGS", "Topic"]


@dataclass(frozen=True, slots=True)
class Topic:
    """Phrases about one topic that fit into the sentences of :mod:`.texts`, six of each kind."""

    name: str
    activities: tuple[str, ...]
    failures: tuple[str, ...]
    techniques: tuple[str, ...]
    gains: tuple[str, ...]
    tools: tuple[str, ...]
    chores: tuple[str, ...]
    factors: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split("|"))


_ALGORITHM = Topic(
    "algorithm",
    _list(
        "complexity analysis|edge case review|invariant checking|input profiling|proof reading|numeric range checking"
    ),
    _list("quadratic blowups|infinite loops|off-by-one errors|stack overflows|silent rounding loss|unstable orderings"),
    _list("divide and conquer|memoised recursion|a sliding window|binary search|topological sorting|a priority queue"),
    _list("linear running time|stable sorting|predictable memory|correct pagination|exact deduplication|fast lookups"),
    _list(
        "a complexity profiler|a property tester|a graph visualiser|an input fuzzer|a trace recorder|a scheduler model"
    ),
    _list("batch ranking|path planning|conflict resolution|record matching|queue balancing|interval merging"),
    _list("exactness|recursion depth|lookup speed|memory footprint|approximation|preprocessing effort"),
)
_DEVELOPMENT = Topic(
    "development",
    _list("code review|dependency pinning|refactoring|type checking|small commits|interface design"),
    _list("merge conflicts|dead code|circular imports|broken builds|hidden coupling|version drift"),
    _list(
        "feature flags|dependency injection|trunk based branching|semantic versioning|pair programming|a facade class"
    ),
    _list("readable modules|safe upgrades|shorter reviews|reusable components|clean interfaces|quick onboarding"),
    _list(
        "a code formatter|a changelog writer|a dependency updater|a template generator|a commit linter|an import sorter"
    ),
    _list("release notes|licence checks|stub generation|branch cleanup|schema migration|package publishing"),
    _list("abstraction|simplicity|code reuse|delivery speed|backward compatibility|explicitness"),
)
_PERFORMANCE = Topic(
    "performance",
    _list(
        "load profiling|cache tuning|query planning|memory auditing|latency budgeting|connection pooling",
    ),
    _list(
        "slow start-up|cache stampedes|memory leaks|tail latency spikes|lock contention|disk saturation",
    ),
    _list("request batching|lazy loading|index hints|zero-copy reads|work stealing|response compression"),
    _list("steady throughput|low tail latency|smaller images|cheaper queries|warm caches|even load"),
    _list(
        "a flame graph viewer|a load generator|a cache inspector|a heap sampler|a query explainer|a latency dashboard"
    ),
    _list("capacity planning|regression detection|hot path discovery|cache warming|pool sizing|benchmark comparison"),
    _list("throughput|latency|cache size|parallelism|data freshness|batch size"),
)
_SECURITY = Topic(
    "security",
    _list("key rotation|access review|input validation|patch management|threat modelling|secret scanning"),
    _list("leaked credentials|injection attacks|privilege escalation|replayed requests|stale accounts|exposed backups"),
    _list("least privilege|parameterised statements|token expiry|content signing|rate limiting|sandboxed execution"),
    _list("auditable access|contained breaches|trusted builds|private logs|safe uploads|verified identities"),
    _list(
        "a secret scanner|a permission auditor|a certificate monitor|a policy checker|a log redactor|a token revoker"
    ),
    _list(
        "certificate renewal|incident triage|vulnerability reports|account offboarding|policy enforcement|key escrow"
    ),
    _list("user convenience|strict isolation|audit detail|session length|privacy|recovery access"),
)
_QUERIES = Topic(
    "queries",
    _list(
        "intent clarification|question rephrasing|scope narrowing|context recall|follow-up planning|assumption checking"
    ),
    _list("wrong answers|endless clarification|ignored constraints|misread intent|repeated questions|lost context"),
    _list(
        "query decomposition|keyword expansion|a clarifying question|example elicitation|source ranking|slot filling"
    ),
    _list("relevant answers|shorter dialogues|complete requirements|precise retrieval|fewer corrections|clear intent"),
    _list("a query rewriter|an intent classifier|a question router|a synonym list|a context tracker|an answer ranker"),
    _list("request triage|question routing|search suggestions|dialogue summaries|frequent answers|feedback collection"),
    _list("brevity|coverage|speed of reply|certainty|user guidance|open exploration"),
)
_EXPLANATIONS = Topic(
    "explanations",
    _list("example building|audience analysis|analogy testing|step numbering|jargon removal|summary writing"),
    _list("confused readers|skipped steps|false confidence|misplaced detail|circular definitions|unanswered whys"),
    _list(
        "a worked example|a concrete analogy|progressive disclosure|a contrast case|a labelled diagram|plain wording"
    ),
    _list(
        "lasting understanding|confident readers|traceable reasoning|shared vocabulary|quick recall|honest uncertainty"
    ),
    _list(
        "a glossary builder|a diagram generator|a readability checker|an outline maker|an example bank|a source finder"
    ),
    _list("tutorial drafts|step by step guides|terminology checks|lesson plans|quiz generation|translation review"),
    _list("depth|accessibility|rigour|entertainment|formality|completeness"),
)
_CONCEPTS = Topic(
    "concepts",
    _list(
        "definition sharpening|model comparison|boundary testing|taxonomy upkeep|counterexample search|premise auditing"
    ),
    _list("category errors|vague terminology|overgeneralisation|false analogies|hidden premises|conflated causes"),
    _list(
        "first principles|a concept map|causal diagrams|thought experiments|dimensional reasoning|Socratic questioning"
    ),
    _list(
        "transferable insight|consistent terms|sound judgement|testable hypotheses|simple theories|sharper distinctions"
    ),
    _list("a concept mapper|an ontology editor|an argument checker|a notes linker|a definition index|a belief tracker"),
    _list("literature mapping|knowledge linking|hypothesis tracking|term extraction|argument review|idea clustering"),
    _list("generality|precision|intuition|formal proof|novelty|shared convention"),
)
_TESTING = Topic(
    "testing",
    _list("regression testing|fixture cleanup|mutation testing|coverage review|contract testing|seed recording"),
    _list("flaky suites|untested branches|escaped defects|order dependence|brittle assertions|false alarms"),
    _list("property based tests|fault injection|golden files|test doubles|snapshot comparison|boundary value analysis"),
    _list("reproducible failures|fearless changes|fast feedback|isolated defects|trusted releases|measured coverage"),
    _list("a test selector|a flake detector|a fixture factory|a coverage reporter|a mock server|a replay harness"),
    _list("nightly test runs|failure triage|data seeding|browser checks|release sign-off|bug reproduction"),
    _list("test isolation|realism|suite speed|coverage|maintenance effort|determinism"),
)
_DOCUMENTATION = Topic(
    "documentation",
    _list("runbook review|example testing|link checking|decision recording|glossary upkeep|screenshot renewal"),
    _list("outdated guides|lost decisions|broken links|duplicated pages|tribal knowledge|misleading examples"),
    _list("docs as code|architecture records|task oriented pages|executable examples|a style guide|a single source"),
    _list("self-service support|searchable knowledge|faster handovers|accurate references|fewer tickets|quick lookups"),
    _list("a link checker|a docs linter|an API reference builder|a page index|a change digest|a snippet runner"),
    _list("reference updates|onboarding packs|page audits|version notices|meeting minutes|table of contents updates"),
    _list("detail|scannability|freshness|authoring effort|a single voice|reader autonomy"),
)
_DEPLOYMENT = Topic(
    "deployment",
    _list("staged rollouts|backup drills|configuration review|image scanning|rollback rehearsal|capacity checks"),
    _list("failed releases|configuration drift|prolonged outages|data loss|version skew|downtime at peak hours"),
    _list("blue-green releases|canary traffic|immutable images|infrastructure as code|health gates|automatic rollback"),
    _list(
        "zero-downtime releases|repeatable environments|quick rollbacks|smaller blast radius|calm releases|known states"
    ),
    _list(
        "a release pipeline|a rollback script|a drift detector|an image builder|a secrets injector|a migration runner"
    ),
    _list("environment setup|cluster upgrades|database migrations|artifact promotion|certificate rollout|cost reports"),
    _list("release frequency|stability|automation|manual control|environment parity|infrastructure cost"),
)
_MONITORING = Topic(
    "monitoring",
    _list("alert review|log sampling|dashboard pruning|on-call handover|metric naming|incident review"),
    _list("alert fatigue|silent failures|missing traces|unnoticed saturation|late detection|noisy dashboards"),
    _list("distributed tracing|error budgets|anomaly detection|structured logging|synthetic probes|burn rate alerts"),
    _list("early warning|short outages|explained incidents|meaningful alerts|visible trends|accountable services"),
    _list("an alert router|a log parser|an uptime probe|a trace sampler|a status page|a metric exporter"),
    _list("incident timelines|log rotation|service level reports|alert routing|health checks|trend summaries"),
    _list("alert sensitivity|log volume|storage cost|diagnostic detail|sampling rate|quiet nights"),
)

DOMAINS: dict[str, tuple[Topic, ...]] = {
    "technical": (_ALGORITHM, _DEVELOPMENT, _PERFORMANCE, _SECURITY),
    "conversational": (_QUERIES, _EXPLANATIONS, _CONCEPTS),
    "practical": (_TESTING, _DOCUMENTATION, _DEPLOYMENT, _MONITORING),
}

SETTINGS: dict[str, tuple[str, ...]] = {
    "technical": ("", "in web services", "in data pipelines", "in embedded devices", "in shared libraries"),
    "conversational": ("", "in customer support", "in classroom tutoring", "in research reviews", "with new users"),
    "practical": ("", "in small teams", "on legacy systems", "during incidents", "across several regions"),
}
"""Where it happens; often not said."""
