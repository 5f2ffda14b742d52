//! Those who act: writers that commit, clone and drop; readers that keep epochs open; collectors.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use epochfs::epoch::{BytesSource, CommitOptions, Epoch, EpochStore, Moves, Survey, commit_of};
use epochfs::gc::{Canary, Collector, CollectorSettings, Step};
use epochfs::platform::clock::Clock;
use epochfs::platform::random::{Seeded, simulate};
use epochfs::repo::{Index, LeaseSettings, Repository};
use epochfs::{Error, Kind};
use epochfs_format::{Attributes, Body, ObjectRef};

use super::reach;
use super::world::{Outcome, Reading, World, WorldClock, WorldStore};
use crate::support::{Check, Saying, latest, numbered, options};

const WRITERS: usize = 3;
const READERS: usize = 2;
const COLLECTORS: usize = 2;
const CALLS_MAX: u64 = 3000;
const LEASE: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;

/// The pages of a stream, by what they hold; 0 is zeros.
type Content = Vec<u8>;

/// What was acknowledged.
#[derive(Default)]
struct Oracle {
    committed: BTreeMap<(Arc<str>, u64), Content>,
    /// Epochs that somebody tried to drop.
    dropped: BTreeSet<(Arc<str>, u64)>,
}

struct Run {
    world: Arc<World>,
    oracle: Mutex<Oracle>,
    seed: u64,
    canary: Option<Canary>,
}

fn bytes_of(content: &Content) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(content.len() * PAGE);
    for page in content {
        let mut seeded = Seeded::new(u64::from(*page));
        let word = seeded.next().to_le_bytes();
        let fill = if *page == 0 { [0; 8] } else { word };
        bytes.extend(fill.iter().cycle().take(PAGE));
    }
    bytes
}

/// Runs a seed; tells what was violated.
pub fn run(seed: u64, canary: Option<Canary>) -> Result<Outcome, String> {
    let actors = WRITERS + READERS + COLLECTORS;
    let world = World::new(seed, actors, CALLS_MAX);
    simulate(Some(Seeded::of(seed, 99)));
    Repository::create(Arc::new(world.objects.clone())).unwrap();
    let run = Run { world: world.clone(), oracle: Mutex::default(), seed, canary };
    std::thread::scope(|scope| {
        for actor in 0..actors {
            let run = &run;
            scope.spawn(move || run.act(actor));
        }
    });
    let result = run.finish();
    simulate(None);
    let outcome = world.lock().outcome.clone();
    result.map(|()| outcome)
}

impl Run {
    fn oracle(&self) -> std::sync::MutexGuard<'_, Oracle> {
        self.oracle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act(&self, actor: usize) {
        let life = |seeded: &mut Seeded| {
            if actor < WRITERS {
                self.write(seeded)
            } else if actor < WRITERS + READERS {
                self.read(actor, seeded)
            } else {
                self.collect()
            }
        };
        self.world.live(self.seed, actor, life, || drop(self.world.lock().reading.remove(&actor)));
    }

    /// A process that has just begun.
    fn open(&self) -> Option<EpochStore> {
        let repository = Repository::open(Arc::new(WorldStore(self.world.clone()))).ok()?;
        let settings = LeaseSettings {
            lease: LEASE,
            interval: LEASE / 6,
            host: "simulated".into(),
            clock: Arc::new(WorldClock(self.world.clone())),
            background: false,
            enabled: true,
        };
        Some(EpochStore::new(repository).with_leases(settings).with_index(Arc::new(Index::in_memory())))
    }

    fn random_epoch(&self, seeded: &mut Seeded) -> Option<(Arc<str>, u64)> {
        let oracle = self.oracle();
        // Some are of machines that were removed: whoever wants one finds out.
        let there: Vec<_> = oracle.committed.keys().filter(|name| !oracle.dropped.contains(name)).collect();
        (!there.is_empty()).then(|| there[seeded.below(there.len() as u64) as usize].clone())
    }

    fn write(&self, seeded: &mut Seeded) -> Check {
        let Some(store) = self.open() else { return Ok(()) };
        let life = 1 + seeded.below(12);
        for _ in 0..life {
            if self.world.is_over() {
                return Ok(());
            }
            match seeded.below(10) {
                0..4 => self.commit(&store, seeded)?,
                4 => self.store_again(&store, seeded)?,
                5 => self.clone(&store, seeded)?,
                6 => drop(store.readers().renew()),
                7..9 => {
                    let Some((machine, epoch)) = self.random_epoch(seeded) else { continue };
                    self.oracle().dropped.insert((machine.clone(), epoch));
                    let dropped = store.drop_epochs(&machine, &BTreeSet::from([epoch]));
                    self.tolerate("dropping", dropped, &[Kind::Io, Kind::NotFound, Kind::Conflict])?;
                }
                _ => {
                    let machine: Arc<str> = format!("m{}", seeded.below(4)).into();
                    if !seeded.chance(150) {
                        continue;
                    }
                    let removed = store.remove_machine(&machine, true);
                    self.tolerate("removing", removed, &[Kind::Io, Kind::NotFound, Kind::Conflict])?;
                }
            }
        }
        Ok(())
    }

    /// Errors of these kinds are no violation.
    fn tolerate<T>(&self, what: &str, result: Result<T, Error>, kinds: &[Kind]) -> Check<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if kinds.contains(&error.kind()) => {
                if error.to_string().contains("condemned") {
                    self.world.lock().outcome.refused += 1;
                }
                Ok(None)
            }
            Err(error) => Err(format!("{what}: {error}")),
        }
    }

    fn commit(&self, store: &EpochStore, seeded: &mut Seeded) -> Check {
        let machine: Arc<str> = format!("m{}", seeded.below(4)).into();
        let inline_len_max = Some(if seeded.chance(300) { 128 << 10 } else { 0 });
        let options = CommitOptions { inline_len_max, ..options() };
        let Some(mut commit) = self.begin(store, &machine, options)? else { return Ok(()) };
        let parent = commit.parent();
        let before = self.oracle().committed.get(&(machine.clone(), parent)).cloned();
        let mut content = before.unwrap_or_else(|| vec![0; 1 + seeded.below(12) as usize]);
        for _ in 0..1 + seeded.below(4) {
            let at = seeded.below(content.len() as u64) as usize;
            // Few different pages, so that the index finds many.
            content[at] = seeded.below(40) as u8;
        }
        let source = BytesSource::new("memory", bytes_of(&content));
        let committed = commit
            .add_stream(b"memory", Attributes::default(), &source, None)
            .and_then(|()| commit.finish())
            .map(|committed| committed.epoch);
        // A parent that was dropped and collected meanwhile cannot be compared with any more.
        let kinds: &[Kind] = if parent > 0 && self.is_dropped(&machine, parent)? {
            &[Kind::Io, Kind::Conflict, Kind::Damaged]
        } else {
            &[Kind::Io, Kind::Conflict]
        };
        if let Some(epoch) = self.tolerate("committing", committed, kinds)? {
            self.acknowledged(machine, epoch, content)?;
        }
        Ok(())
    }

    /// Stores what a machine's newest epoch holds once more, and some of it at other places.
    fn store_again(&self, store: &EpochStore, seeded: &mut Seeded) -> Check {
        let machine: Arc<str> = format!("m{}", seeded.below(4)).into();
        let kinds = &[Kind::Io, Kind::Conflict, Kind::NotFound, Kind::Damaged];
        let surveyed = store.epoch(&latest(&machine)).and_then(|epoch| Survey::of(&epoch));
        let Some(survey) = self.tolerate("surveying", surveyed, kinds)? else { return Ok(()) };
        let mut objects: Vec<ObjectRef> = survey.used.into_keys().collect();
        objects.sort();
        let moves: Moves = objects.into_iter().filter(|_| seeded.chance(600)).collect();
        let again = store.store_again(&machine, &Arc::new(moves), options());
        // The epoch may be dropped and collected meanwhile.
        if let Some(made) = self.tolerate("storing again", again, kinds)? {
            let parent = commit_of(&made.record).saying("its record")?.parent;
            self.world.lock().outcome.stored_again += 1;
            let content = self.oracle().committed.get(&(machine.clone(), parent)).cloned();
            // What was committed and never acknowledged is nobody's to compare with.
            if let Some(content) = content {
                self.acknowledged(machine, made.epoch, content)?;
            }
        }
        Ok(())
    }

    /// Whether a record of the machine's log drops this epoch.
    fn is_dropped(&self, machine: &Arc<str>, epoch: u64) -> Check<bool> {
        let repository = Repository::open(Arc::new(self.world.objects.clone())).saying("opening")?;
        for seq in epoch + 1.. {
            let Some((record, _)) = repository.objects().record(machine, seq).saying(machine)? else { break };
            match record.body {
                Body::Drop { epochs } if epochs.contains(&epoch) => return Ok(true),
                Body::Remove => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }

    fn begin(
        &self,
        store: &EpochStore,
        machine: &Arc<str>,
        options: CommitOptions,
    ) -> Check<Option<epochfs::epoch::CommitBuilder>> {
        let begun = store.begin_commit(machine, options);
        self.tolerate("beginning", begun, &[Kind::Io, Kind::Conflict, Kind::NotFound, Kind::Damaged])
    }

    /// The epoch is there from now on, with all it needs.
    fn acknowledged(&self, machine: Arc<str>, epoch: u64, content: Content) -> Check {
        self.world.lock().outcome.committed += 1;
        self.oracle().committed.insert((machine.clone(), epoch), content);
        reach::reachable(&self.world.objects, &[]).saying(format!("after {machine}@{epoch} was acknowledged")).map(drop)
    }

    fn clone(&self, store: &EpochStore, seeded: &mut Seeded) -> Check {
        let Some((machine, epoch)) = self.random_epoch(seeded) else { return Ok(()) };
        let to: Arc<str> = format!("c{}", seeded.below(6)).into();
        let kinds = &[Kind::Io, Kind::Conflict, Kind::NotFound];
        let source = store.repository().epoch_record(&machine, epoch);
        let Some(source) = self.tolerate("looking for", source, kinds)? else { return Ok(()) };
        if let Some(head) = self.tolerate("cloning", store.clone_epoch(&source, &to), kinds)? {
            let content = self.oracle().committed[&(machine, epoch)].clone();
            self.acknowledged(to, head.record.seq, content)?;
        }
        Ok(())
    }

    /// Keeps epochs open, one after the other, and reads them again and again.
    fn read(&self, actor: usize, seeded: &mut Seeded) -> Check {
        let Some(store) = self.open() else { return Ok(()) };
        let clock = WorldClock(self.world.clone());
        for _ in 0..1 + seeded.below(4) {
            let Some((machine, epoch)) = self.random_epoch(seeded) else {
                clock.sleep(Duration::from_secs(1));
                continue;
            };
            // Before anything is asked: the lease counts from here on, or from later.
            let mut renewed = clock.elapsed();
            if store.readers().renew().is_err() {
                continue;
            }
            let Ok(open) = store.epoch(&numbered(&machine, epoch)) else { continue };
            self.world.lock().outcome.opened += 1;
            let content = self.oracle().committed.get(&(machine.clone(), epoch)).cloned();
            for _ in 0..1 + seeded.below(12) {
                if clock.elapsed() >= renewed + LEASE {
                    self.lost();
                    break;
                }
                let reading = Reading { machine: machine.clone(), epoch, until: renewed + LEASE };
                self.world.lock().reading.insert(actor, reading);
                let read = read_all(&open, content.as_ref());
                if let Err((kind, sentence)) = read
                    && kind != Kind::Io
                {
                    if clock.elapsed() >= renewed + LEASE {
                        self.lost();
                        break;
                    }
                    return Err(format!("reading {machine}@{epoch} under a lease: {sentence}"));
                }
                clock.sleep(Duration::from_millis(seeded.below(15_000)));
                let before = clock.elapsed();
                if before >= renewed + LEASE {
                    self.lost();
                    break;
                }
                let is_renewed = store.readers().renew().is_ok();
                // The old lease may have ended before the new one was there.
                if clock.elapsed() >= renewed + LEASE {
                    self.lost();
                    break;
                }
                if is_renewed {
                    renewed = before;
                }
            }
            self.world.lock().reading.remove(&actor);
        }
        Ok(())
    }

    fn lost(&self) {
        self.world.lock().outcome.lost += 1;
    }

    fn collector(&self) -> Option<Collector> {
        let settings = CollectorSettings {
            orphans_after: Duration::ZERO,
            clock: Arc::new(WorldClock(self.world.clone())),
            canary: self.canary,
            ..CollectorSettings::default()
        };
        Some(Collector::new(Arc::new(self.open()?), settings))
    }

    fn collect(&self) -> Check {
        let Some(mut collector) = self.collector() else { return Ok(()) };
        let clock = WorldClock(self.world.clone());
        while !self.world.is_over() {
            let step = collector.step(&mut |_, _| {});
            match self.tolerate("collecting", step, &[Kind::Io, Kind::Conflict])? {
                Some(Step::Waiting(_)) => clock.sleep(Duration::from_secs(2)),
                Some(Step::Clean) => clock.sleep(Duration::from_secs(15)),
                Some(Step::Done(collected)) => {
                    let outcome = &mut self.world.lock().outcome;
                    outcome.deleted += collected.deleted;
                    outcome.emptied += collected.emptied;
                    outcome.kept += collected.kept;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// When all is quiet: everything acknowledged is there, and nothing else is.
    fn finish(&self) -> Check {
        if let Some(violation) = self.world.lock().violation.take() {
            return Err(violation);
        }
        // What is late arrives, and the leases of the dead end.
        let clock = WorldClock(self.world.clone());
        clock.sleep(Duration::from_secs(3600));
        let mut collector = self.collector().ok_or("the repository cannot be opened")?;
        let mut steps = 0;
        loop {
            match collector.step(&mut |_, _| {}).saying("the last collection")? {
                Step::Clean => break,
                Step::Waiting(_) => clock.sleep(Duration::from_secs(2)),
                _ => {}
            }
            steps += 1;
            if steps > 1000 {
                return Err("the last collection comes to no end".into());
            }
        }
        let needed = reach::reachable(&self.world.objects, &[])?;
        let mut leaked = reach::packs(&self.world.objects);
        leaked.extend(reach::carrying(&self.world.objects)?);
        leaked.retain(|key| !needed.contains_key(key));
        if !leaked.is_empty() {
            return Err(format!("nobody needs {leaked:?}, and yet it stays"));
        }
        let store = self.open().ok_or("the repository cannot be opened")?;
        let oracle = self.oracle();
        for ((machine, epoch), content) in &oracle.committed {
            let name = format!("{machine}@{epoch}");
            match store.epoch(&numbered(machine, *epoch)) {
                Ok(open) => {
                    read_all(&open, Some(content)).map_err(|(_, sentence)| format!("{name} at the end: {sentence}"))?;
                }
                Err(error) if error.kind() == Kind::NotFound => {
                    if !self.is_dropped(machine, *epoch)? {
                        return Err(format!("{name} was acknowledged and is not there: {error}"));
                    }
                }
                Err(error) => return Err(format!("{name} at the end: {error}")),
            }
        }
        let verified = store.verify(&mut |_, _| {}).saying("verifying")?;
        if !verified.is_whole() || !verified.unknown_objects.is_empty() {
            return Err(format!("{verified:?}"));
        }
        Ok(())
    }
}

fn read_all(epoch: &Epoch, content: Option<&Content>) -> Result<(), (Kind, String)> {
    let told = |error: Error| (error.kind(), error.to_string());
    let mut reader = epoch.stream(b"memory").map_err(told)?;
    let mut bytes = vec![0; reader.len() as usize];
    reader.read_at(0, &mut bytes).map_err(told)?;
    match content {
        Some(content) if bytes_of(content) != bytes => Err((Kind::Damaged, "other bytes than were committed".into())),
        _ => Ok(()),
    }
}
