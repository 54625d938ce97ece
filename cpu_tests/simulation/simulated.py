"""A simulated life of one store, which follows from a seed and is held against a plain dict.

Up to three stores are open on one file, as if each were a process. They act in seeded order, and at times one acts in
the midst of another's call: while a text is embedded, between two stages of maintenance, before a commit is synced.
Background work is stepped by hand. Below them lies ``world.SimulatedDisk``: calls fail, the disk is full, an actor is
killed, the power goes. Between the steps derived files are damaged, the clock jumps, backups come back.

After each fault the store must be one of the dicts that it may be, in records, vectors and search; see ``settle``.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from endurance import DIM, KINDS, Model, Operation, contents, damage, embed, model_after, perform, unit_of, verify
from fault_vfs import FAULTS

from memevolve_gpu import CorruptStoreError, MemEvolveError, StorageConfig, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.live import scheduler, snapshot_writer

from .world import SimulatedDisk, world

__all__ = ["STEPS", "BrokenPromiseError", "Outcome", "simulate"]

STEPS = 40
IDS = 60
ACTORS = 3

OPERATIONS = {
    **dict.fromkeys(("maintain", "checkpoint", "background", "delete_batch", "replace"), 4.0),
    **dict.fromkeys(("prune", "forget"), 2.0),
    "store": 30,
    "batch": 8,
    "update": 12,
    "edit": 6,
    "delete": 12,
    "search": 10,
    "snapshot": 5,
    "reopen": 6,
    "backup": 3,
    "clear": 0.5,
}
EVENTS = {"damage": 6, "jump": 4, "restore": 2, "overwrite": 2, "outage": 3, "open": 5}
RARE = ("sync", "lost", "truncate", "open", "delete", "lock")
"""Faults of calls of which an operation makes only a few."""

FAULTY = 0.3
"""Share of the operations that meet a fault, a kill or a power cut."""


class BrokenPromiseError(AssertionError):
    """What was promised did not hold; the message says how to replay it."""


class Doing(NamedTuple):
    """An operation of one actor, and what it makes of the dict."""

    name: str
    do: Callable[[VectorStore], object]
    after: Callable[[Model], Model] = dict


@dataclass
class Outcome:
    """What happened: the trace hash, and how often each thing did."""

    seed: int
    trace: str = ""
    tally: Counter[str] = field(default_factory=Counter)


def simulate(seed: int, steps: int = STEPS, say: Callable[[str], object] = lambda line: None) -> Outcome:
    """Run one simulation. Raises BrokenPromiseError, whose message names the seed and the step."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        root = Path(folder).resolve()
        (root / "0").mkdir()
        with world(str(seed), root / "0") as (disk, clock):
            one = _Simulation(seed, root, disk, say)
            one.jump = lambda: setattr(clock, "now", clock.now + one.rng.choice([-1, 1]) * one.rng.random() * 10**7)
            try:
                one.run(steps)
            except Exception as error:
                raise BrokenPromiseError(f"seed {seed}, after {one.done} steps ({one.last}): {error}") from error
            finally:
                disk.spare()
                disk.bury()
                one.stop_all()
            return Outcome(seed, disk.digest.hexdigest(), one.tally)


class _Simulation:
    def __init__(self, seed: int, root: Path, disk: SimulatedDisk, say: Callable[[str], object]) -> None:
        self.rng = rng = random.Random(seed)
        self.root, self.disk, self.say = root, disk, say
        self.durability = rng.choice(["full", "full", "full", "normal"])
        self.config = StorageConfig(
            index_type=rng.choice(["flat", "flat", "hnsw", "ivf"]),
            metric=rng.choice(["l2", "cosine"]),
            min_training_units=24,
            durability=self.durability,
            background=False,
            lock_timeout=0.5,
            max_memory_units=10_000,
        )
        self.actors: dict[int, VectorStore] = {}
        self.model: Model = {}
        self.past: list[Model] = [{}]
        """What a power cut may bring back under durability normal, oldest first."""
        self.doubtful: list[Model] = []
        """What killed writes would have made. The bytes of the last one may lie in the log, complete, so that recovery
        finds them, until a later commit overwrites them."""
        self.copies: list[tuple[str, Model]] = []
        self.stale: list[bytes] = []
        """Snapshots of earlier times."""
        self.tally: Counter[str] = Counter()
        self.made = self.lives = self.depth = self.done = 0
        self.last = ""
        self.cause: Exception | None = None
        self.jump: Callable[[], None] = lambda: None

    @property
    def prefix(self) -> Path:
        return Path(self.disk.folder) / "store"

    def run(self, steps: int) -> None:
        short = {"DELTA_ROWS": 12, "DELTA_MOST": 12, "QUIET_ROWS": 6}
        kept = {name: getattr(scheduler, name) for name in short}, snapshot_writer.LOG_KEPT
        snapshot_writer.LOG_KEPT = self.rng.choice([5, 40])
        vars(scheduler).update(short)
        try:
            for number in range(steps):
                self.done = number
                self.step()
            self.stop_all()
            self.open(0)
            self.whole(self.actors[0], [self.model])
        finally:
            vars(scheduler).update(kept[0])
            snapshot_writer.LOG_KEPT = kept[1]

    # Steps

    def step(self) -> None:
        names = {**OPERATIONS, **EVENTS}
        name = self.rng.choices(list(names), list(names.values()))[0]
        who = self.rng.randrange(ACTORS)
        self.last = f"{name} by {who}"
        if name in EVENTS:
            self.tally[name] += 1
            getattr(self, f"have_{name}")(who)
        else:
            self.act(who, self.operation(name))
        self.disk.tell(self.last, len(self.model))
        self.say(f"{self.done:3} {self.last}: {len(self.model)} units")

    def operation(self, name: str) -> Doing:
        """One operation, drawn; those that the harness of real kills knows are performed and modelled by it."""
        count = self.rng.randrange(1, 25) if "batch" in name or name == "replace" else 1
        ids = [f"id{self.rng.randrange(IDS)}" for _ in range(count)]
        drawn = {"kind": name, "ids": ids, "contents": [self.text(one) for one in ids], "type": self.rng.choice(KINDS)}
        made = getattr(self, f"make_{name}", None)
        if made is not None:
            return Doing(name, *made(drawn))
        return Doing(name, partial(perform, operation=drawn), partial(model_after, operation=drawn))

    def text(self, unit_id: str) -> str:
        """A text that no other version of any unit has, so that its vector is its own."""
        self.made += 1
        return f"w{self.rng.randrange(8)} {unit_id} version {self.made}"

    def make_search(self, drawn: Operation) -> Any:
        return lambda store: self.glance(store, self.model), dict

    def make_background(self, drawn: Operation) -> Any:
        return lambda store: store._open._background_round(), dict

    def make_maintain(self, drawn: Operation) -> Any:
        return lambda store: store.run_maintenance(lambda *_: self.meanwhile(store)), dict

    def make_replace(self, drawn: Operation) -> Any:
        gone, units = (
            list(dict.fromkeys(drawn["ids"][::2])),
            [unit_of(drawn, i) for i in range(0, len(drawn["ids"]), 3)],
        )
        kept = {"ids": gone, "kind": "delete_batch", "contents": gone}
        put = {**drawn, "kind": "batch", "ids": drawn["ids"][::3], "contents": drawn["contents"][::3]}
        return (
            lambda store: store.replace_batch(gone, units),
            lambda model: model_after(model_after(model, kept), put),
        )

    def make_prune(self, drawn: Operation) -> Any:
        return self.managed(lambda strategy, store, **how: strategy.prune(store, {"type": drawn["type"]}, **how))

    def make_forget(self, drawn: Operation) -> Any:
        return self.managed(
            lambda strategy, store, **how: strategy.apply_forgetting(store, "random", 5, seed=self.done, **how)
        )

    def managed(self, call: Callable[..., Any]) -> Any:
        """What a strategy will delete is asked of it before any fault can strike."""
        strategy, doomed = SimpleManagementStrategy(), set[str]()
        for store in list(self.actors.values())[:1]:
            doomed = set(call(strategy, store, dry_run=True).ids)
        return lambda store: call(strategy, store), lambda model: {i: u for i, u in model.items() if i not in doomed}

    def make_backup(self, drawn: Operation) -> Any:
        name = f"copy{len(self.copies)}-{self.done}"

        def back_up(store: VectorStore) -> None:
            store.backup(self.prefix.with_name(name))
            self.copies.append((name, self.model))

        return back_up, dict

    def make_reopen(self, drawn: Operation) -> Any:
        def reopen(store: VectorStore) -> None:
            who = self.disk.current
            self.actors.pop(who, None)
            store.close()
            self.open(who)

        return reopen, dict

    # One operation, with what may go wrong

    def act(self, who: int, doing: Doing) -> None:
        """Perform it, maybe with a fault, and settle what the store is then."""
        if who not in self.actors:
            self.open(who)
        before_names = set(self.copies_there())
        how = self.misfortune()
        goes_well = self.attempt(who, doing)
        struck, fired = self.disk.struck, bool(self.disk.fired)
        self.disk.spare()
        self.last += f", {how}: {'done' if goes_well else 'not done'} {struck}"
        self.tally[doing.name] += 1
        if not goes_well and not struck and not fired:
            raise BrokenPromiseError(f"{doing.name} failed without a fault: {self.cause!r}")
        after = doing.after(self.model)
        candidates = [after] if goes_well else [self.model, after]
        if struck or fired:
            self.tally[struck or how.split()[0]] += 1
            if after != self.model:
                self.doubtful = [] if goes_well else [*self.doubtful, after] if struck == "kill" else self.doubtful
            self.settle(who, struck, candidates, before_names)
        else:
            self.remember(after, doing.name)
            self.glance(self.actors[who], self.model)

    def misfortune(self) -> str:
        """Arm a fault, sometimes; what it is."""
        self.disk.fired, self.disk.struck = 0, ""
        if self.rng.random() >= FAULTY:
            return "no fault"
        how = self.rng.choice(["kill", "kill", "cut", "cut", *FAULTS])
        at = int(self.rng.choice([1, 3] if how in RARE else [1, 3, 10, 30]) * self.rng.random()) + 1
        if how in ("kill", "cut"):
            self.disk.strike(how, at)
        else:
            self.disk.arm(how, at)
        return f"{how} at {at}"

    def attempt(self, who: int, doing: Doing) -> bool:
        self.disk.current, self.cause = who, None
        if len(self.actors) > 1 and self.rng.random() < 0.2:
            self.disk.at_sync = partial(self.look_at_another, who, doing)
        try:
            doing.do(self.actors[who])
            return True
        except MemEvolveError as error:
            self.cause = error
            return False
        finally:
            self.disk.at_sync = None

    def settle(self, who: int, struck: str, candidates: list[Model], copies: set[str]) -> None:
        """After a fault: find out which of the candidates the store is, and hold it against that one."""
        newest = candidates
        self.go_on_after(struck, who)
        if struck:
            candidates = [*self.doubtful, *candidates]
            struck = self.fall_again(who, struck) if self.rng.random() < 0.3 else struck
        if struck == "cut" and self.durability == "normal":
            candidates = [*self.past, *candidates]
        if struck or who not in self.actors or self.rng.random() < 0.5:
            self.open(who)
        self.model = self.whole(self.actors[who], candidates)
        self.tally["taken back"] += struck == "cut" and self.model not in newest
        self.past = [self.model] if struck == "cut" else [*self.past, self.model]
        if struck == "cut" or self.model is candidates[-1]:
            self.doubtful = []
        for other in self.actors.values():
            self.glance(other, self.model)
        acknowledged = {name for name, _ in self.copies}
        unknown = self.copies_there() - copies - acknowledged
        for name in unknown:  # the call that made it failed or was killed after its name was there
            self.copies.append((name, self.model))
        self.check_copies()

    def go_on_after(self, struck: str, who: int) -> None:
        """The dead are closed; after a power cut the files are what the disk kept."""
        if struck == "cut":
            self.stop_all()
            self.lives += 1
            self.disk.lay_out(self.root / str(self.lives))
        elif struck == "kill":
            self.stop(who)
            self.disk.bury()

    def fall_again(self, who: int, struck: str) -> str:
        """Another kill or power cut, in the midst of the recovery; the worst of what struck."""
        self.disk.strike(self.rng.choice(["kill", "cut"]), int(self.rng.random() * 12) + 1)
        with suppress(MemEvolveError):
            self.open(who)
        again = self.disk.struck
        self.disk.spare()
        self.tally[f"{again} while recovering"] += bool(again)
        self.tally[again] += bool(again)
        self.go_on_after(again, who)
        return "cut" if "cut" in (struck, again) else struck

    def copies_there(self) -> set[str]:
        return {path.stem for path in Path(self.disk.folder).glob("copy*.db")}

    def check_copies(self) -> None:
        """Every backup that was acknowledged is there and whole; of the others there is nothing or all."""
        for name, model in self.copies[-2:]:
            with self.opened(self.prefix.with_name(name)) as copy:
                verify(copy, [model])

    def remember(self, after: Model, name: str) -> None:
        if after != self.model:
            self.model = after
            self.past.append(after)
            self.doubtful = []
        if name == "checkpoint":
            self.past = [self.model]

    # Opening and closing

    def opened(self, prefix: Path) -> VectorStore:
        return VectorStore(prefix, self.embed, DIM, storage_config=self.config)

    def open(self, who: int) -> None:
        """Open the actor's store anew. Nothing is armed, so it must work."""
        self.stop(who)
        before, self.disk.current = self.disk.current, who
        try:
            self.actors[who] = self.opened(self.prefix)
        finally:
            self.disk.current = before

    def stop(self, who: int) -> None:
        store = self.actors.pop(who, None)
        if store is not None:
            with suppress(MemEvolveError):
                store.close()

    def stop_all(self) -> None:
        for who in list(self.actors):
            self.stop(who)

    # What happens in the midst of a call

    def embed(self, text: str) -> Any:
        vector = embed(text)
        if self.rng.random() < 0.05:
            self.meanwhile(None)
        return vector

    def meanwhile(self, busy: VectorStore | None) -> None:
        """Another actor acts in the midst of a call; never more than one deep, and only while no fault is due."""
        others = [who for who, store in self.actors.items() if store is not busy and who != self.disk.current]
        if self.depth or not others or self.disk.struck or self.disk.is_armed or self.rng.random() < 0.5:
            return
        self.depth += 1
        mine, self.disk.current = self.disk.current, self.rng.choice(others)
        try:
            name = self.rng.choice(["store", "update", "delete", "batch", "search", "edit"])
            doing = self.operation(name)
            doing.do(self.actors[self.disk.current])
            self.tally["meanwhile"] += 1
            self.remember(doing.after(self.model), name)
        finally:
            self.depth -= 1
            self.disk.current = mine

    def look_at_another(self, who: int, doing: Doing) -> None:
        """While a commit is under way another process reads the state before it, or the one after it."""
        self.disk.current = self.rng.choice([other for other in self.actors if other != who])
        held = contents(self.actors[self.disk.current])
        self.disk.current = who
        self.tally["looks into a commit"] += 1
        if held not in (self.model, doing.after(self.model)):
            raise BrokenPromiseError("a reader saw half of a commit")

    # Events between operations

    def have_open(self, who: int) -> None:
        self.open(who)

    def have_jump(self, who: int) -> None:
        self.jump()

    def have_outage(self, who: int) -> None:
        """The power goes while nobody does anything."""
        self.disk.cut_now()
        self.settle(who, "cut", [self.model], self.copies_there())
        self.tally["cut"] += 1

    def have_damage(self, who: int) -> None:
        """Everybody closes, or is killed, and a derived file is hurt."""
        self.stop_all()
        path = Path(f"{self.prefix}.snapshot")
        if path.exists() and path.stat().st_size and self.rng.random() < 0.5:
            self.stale.append(path.read_bytes())
        if self.stale and self.rng.random() < 0.4:
            how = "an old snapshot"
            path.write_bytes(self.rng.choice(self.stale))
        elif self.rng.random() < 0.1:
            how = "foreign"
            path.write_bytes(self.foreign_snapshot())
        else:
            how = damage(
                str(self.prefix), self.rng, ["nothing", "delete", "truncate", "flip", "many flips", "many flips"]
            )
        self.last += f": {how}"
        self.tally[f"snapshot: {how}"] += 1
        self.disk.adopt()
        self.open(who)
        self.whole(self.actors[who], [self.model])

    def foreign_snapshot(self) -> bytes:
        """The snapshot of another store, with units of the same ids."""
        with self.opened(self.root / f"foreign{self.done}") as store:
            store.store_batch([{"id": one, "content": self.text(one)} for one in list(self.model)[:20] or ["id0"]])
            return Path(store.snapshot()).read_bytes()

    def have_restore(self, who: int) -> None:
        """Everybody closes, and a backup takes the store's place, maybe with a fault."""
        if not self.copies:
            return
        name, model = self.rng.choice(self.copies)
        self.stop_all()
        how = self.misfortune()
        self.disk.current = who
        try:
            VectorStore.restore(self.prefix.with_name(name), self.prefix)
            candidates = [model]
        except (MemEvolveError, OSError) as error:
            self.last += f", {how}: {error}"
            candidates = [*self.doubtful, self.model, model]
            if not self.disk.struck and not self.disk.fired:
                raise
        struck = self.disk.struck
        self.disk.spare()
        if struck == "cut" and self.durability == "normal" and len(candidates) > 1:
            candidates = [*self.past, *candidates]
        self.settle_restored(who, struck, candidates)

    def have_overwrite(self, who: int) -> None:
        """Everybody is killed, and somebody copies a backup over the database file, beside the log of the old one."""
        if not self.copies:
            return
        name, model = self.rng.choice(self.copies)
        self.disk.kill_all()
        self.stop_all()
        self.disk.bury()
        log, database = Path(f"{self.prefix}.db-wal"), Path(f"{self.prefix}.db")
        before = database.read_bytes()
        shutil.copyfile(f"{self.prefix.with_name(name)}.db", database)
        is_same = before == database.read_bytes()  # then the log is still its own
        is_stale = log.exists() and log.stat().st_size > 0 and not is_same
        self.disk.adopt()
        self.last += f": stale log {is_stale}"
        self.tally["stale log"] += is_stale
        with suppress(CorruptStoreError):  # the log is refused and set aside, or there is nothing in it but links
            self.open(who)
        self.settle_restored(who, "", [self.model, model] if is_same else [model])

    def settle_restored(self, who: int, struck: str, candidates: list[Model]) -> None:
        self.tally[struck or "done"] += 1
        self.go_on_after(struck, who)
        self.open(who)
        self.model = self.whole(self.actors[who], candidates)
        self.past, self.doubtful = [self.model], []

    # Holding the store against the dict

    def glance(self, store: VectorStore, model: Model) -> None:
        """A cheap look: the count, one unit by its own vector, and everything that a search can find."""
        if store.count() != len(model):
            raise BrokenPromiseError(f"{store.count()} units instead of {len(model)}")
        if model:
            unit = model[self.rng.choice(list(model))]
            self.depth += 1  # nobody else acts meanwhile
            found = store.search(store._unit_to_text(unit), 1)
            self.depth -= 1
            if found[0][1] != unit["id"] or found[0][0] > 1e-4:
                raise BrokenPromiseError(f"{unit} does not find itself but {found}")
            self.disk.tell(found[0][1])
        found_ids = store.search_vectors(np.ones((1, DIM)), len(model) + 3, recall=1.0)[1][0]
        seen = {one for one in found_ids if one is not None}
        if seen != set(model):
            missed, extra = sorted(set(model) - seen), sorted(seen - set(model))
            raise BrokenPromiseError(f"a search misses {missed} and sees {extra}, both wrong")

    def whole(self, store: VectorStore, candidates: list[Model]) -> Model:
        """A thorough look: the store is one of the candidates in records, vectors and search, and check is clean."""
        self.tally["verified"] += 1
        found = verify(store, candidates)
        left = [path.name for path in Path(self.disk.folder).glob("store.*.tmp*")]
        if left:
            raise BrokenPromiseError(f"abandoned drafts were left: {left}")
        return found
