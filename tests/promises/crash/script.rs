//! A sequence of changes to a repository, and what it must hold after each.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use epochfs::epoch::{EpochStore, Ranges};
use epochfs::platform::files::Files;
use epochfs::platform::random::Seeded;
use epochfs::platform::store::LocalStore;
use epochfs::repo::Repository;

use crate::must;
use crate::support::image::{Image, ImageSource, PAGE, noise};
use crate::support::{Check, Saying, Streams, commit, commit_dirty, compare, memory, numbered, options};

pub const ROOT: &str = "/repo";

/// One change.
#[derive(Clone, Debug)]
pub enum Act {
    Init,
    Commit(&'static str, Streams),
    /// Of the stream `memory` only these ranges are new.
    Dirty(&'static str, Image, Ranges),
    Tag(&'static str, u64, &'static str),
    Clone(&'static str, u64, &'static str),
    Drop(&'static str, u64),
}

/// What a repository holds: machines with their epochs and tags. `None` before it is made.
pub type Expected = Option<BTreeMap<String, Machine>>;

#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub epochs: BTreeMap<u64, Streams>,
    pub tags: BTreeMap<String, u64>,
    newest: u64,
}

impl Act {
    /// Does it, as one process would.
    pub fn run(&self, files: &Arc<dyn Files>) -> epochfs::Result<()> {
        if let Self::Init = self {
            let store = LocalStore::create(Path::new(ROOT), files.clone())?;
            return Repository::create(Arc::new(store)).map(|_| ());
        }
        self.run_in(&open(files)?)
    }

    pub fn run_in(&self, store: &EpochStore) -> epochfs::Result<()> {
        match self {
            Self::Init => unreachable!("a repository is made where there is none"),
            Self::Commit(machine, streams) => commit(store, machine, streams, options()).map(|_| ()),
            Self::Dirty(machine, image, dirty) => {
                commit_dirty(store, machine, &ImageSource::new(image.clone()), dirty).map(|_| ())
            }
            Self::Tag(machine, epoch, name) => store.tag(&(*machine).into(), *epoch, name, false).map(|_| ()),
            Self::Clone(from, epoch, to) => {
                let source = store.epoch(&numbered(from, *epoch))?;
                store.clone_epoch(source.record(), to).map(|_| ())
            }
            Self::Drop(machine, epoch) => store.drop_epochs(&(*machine).into(), &[*epoch].into()).map(|_| ()),
        }
    }

    fn apply(&self, expected: &Expected) -> Expected {
        let mut machines = expected.clone().unwrap_or_default();
        let mut add = |machine: &str, streams: Streams| {
            let machine = machines.entry(machine.to_owned()).or_default();
            machine.newest += 1;
            machine.epochs.insert(machine.newest, streams);
        };
        match self {
            Self::Init => {}
            Self::Commit(machine, streams) => add(machine, streams.clone()),
            Self::Dirty(machine, image, _) => add(machine, memory(image)),
            Self::Clone(from, epoch, to) => {
                let streams = expected.as_ref().expect("it was made")[*from].epochs[epoch].clone();
                add(to, streams);
            }
            Self::Tag(machine, epoch, name) => {
                let machine = machines.get_mut(*machine).expect("it exists");
                machine.newest += 1;
                machine.tags.insert((*name).to_owned(), *epoch);
            }
            Self::Drop(machine, epoch) => {
                let machine = machines.get_mut(*machine).expect("it exists");
                machine.newest += 1;
                machine.epochs.remove(epoch);
                machine.tags.retain(|_, tagged| tagged != epoch);
            }
        }
        Some(machines)
    }
}

/// The states before, between and after the acts.
pub fn states(acts: &[Act]) -> Vec<Expected> {
    let mut states = vec![None];
    for act in acts {
        states.push(act.apply(states.last().expect("there is a first")));
    }
    states
}

pub fn open(files: &Arc<dyn Files>) -> epochfs::Result<EpochStore> {
    let store = LocalStore::open(Path::new(ROOT), files.clone())?;
    Ok(EpochStore::new(Repository::open(Arc::new(store))?))
}

pub fn noisy_image(seed: u64, pages: u64) -> Image {
    let mut bytes = vec![0; (pages * PAGE) as usize];
    noise(&mut Seeded::new(seed), &mut bytes);
    Image::of(&bytes)
}

/// Small commits that their records carry, one with a pack that is put and one with a pack that is streamed, a tag,
/// a clone and a drop.
pub fn script() -> Vec<Act> {
    let mut image = noisy_image(1, 3);
    let first = Streams::from([(b"memory".to_vec(), image.clone()), (b"disk0".to_vec(), noisy_image(2, 2))]);
    image.resize(20 * PAGE);
    image.write(5 * PAGE, b"five");
    let second = Ranges::new(vec![5 * PAGE..6 * PAGE]);
    let mut put = image.clone();
    put.resize(600 * PAGE);
    put.write(512 * PAGE, &noisy_image(3, 60).bytes());
    let mut streamed = noisy_image(4, 300);
    streamed.resize(1 << 30);
    vec![
        Act::Init,
        Act::Commit("web1", first),
        Act::Dirty("web1", image, second),
        Act::Commit("web1", memory(&put)),
        Act::Tag("web1", 3, "golden"),
        Act::Clone("web1", 3, "web2"),
        Act::Commit("db", memory(&streamed)),
        Act::Drop("web1", 1),
        Act::Commit("web2", memory(&noisy_image(1, 3))),
    ]
}

/// Compares all that a repository holds with what it must.
pub fn check_state(store: &EpochStore, machines: &BTreeMap<String, Machine>) -> Check {
    check_lists(store, machines)?;
    for (name, machine) in machines {
        for (number, streams) in &machine.epochs {
            let epoch = store.epoch(&numbered(name, *number)).saying(format!("{name}@{number}"))?;
            compare(&epoch, streams)?;
        }
        for (tag, number) in &machine.tags {
            let record = store.repository().tagged_record(&name.as_str().into(), tag).saying(tag)?;
            must!(record.seq == *number, "{tag} names {}", record.seq);
        }
    }
    let verified = store.verify(&mut |_, _| {}).saying("verify")?;
    must!(verified.is_whole(), "verify finds {:?} {:?}", verified.problems, verified.broken_epochs);
    must!(verified.unknown_objects.is_empty(), "verify does not know {:?}", verified.unknown_objects);
    Ok(())
}

pub fn check_lists(store: &EpochStore, machines: &BTreeMap<String, Machine>) -> Check {
    let found: Vec<String> =
        store.repository().machines().saying("machines")?.iter().map(|name| name.to_string()).collect();
    must!(found.iter().eq(machines.keys()), "the machines are {found:?}");
    for (name, machine) in machines {
        let head = store.repository().require(&name.as_str().into()).saying(name)?;
        must!(head.record.seq == machine.newest, "{name} has {} records, not {}", head.record.seq, machine.newest);
        let state = store.repository().state(&head, &mut |_, _| {}).saying(name)?;
        must!(state.epochs.keys().eq(machine.epochs.keys()), "{name}: other epochs: {:?}", state.epochs.keys());
        must!(state.list.tags == machine.tags, "{name}: other tags: {:?}", state.list.tags);
    }
    Ok(())
}

/// A repository that a crash or a failure left behind: it holds what was acknowledged, and of what was begun all or
/// nothing; and it goes on from there. `acknowledged` acts were, and one more may have been begun.
pub fn check_survival(files: &Arc<dyn Files>, acts: &[Act], acknowledged: usize) -> Check {
    let states = states(acts);
    let last = (acknowledged + 1).min(acts.len());
    let store = match open(files) {
        Ok(store) => store,
        Err(error) if acknowledged == 0 => {
            must!(error.kind() == epochfs::Kind::NotFound, "no repository, but {error}");
            Act::Init.run(files).saying("making the repository again")?;
            return check_state(&open(files).saying("open")?, &BTreeMap::new());
        }
        Err(error) => return Err(format!("it cannot be opened: {error}")),
    };
    let candidates = states[acknowledged..=last].iter().flatten();
    let mut wrong = String::new();
    let mut held = None;
    for machines in candidates {
        match check_lists(&store, machines) {
            Ok(()) => held = Some(machines),
            Err(text) => wrong += &format!("{text}; "),
        }
    }
    let Some(machines) = held else {
        return Err(format!("after {acknowledged} acts it holds neither what was before nor after the next: {wrong}"));
    };
    // It goes on, and what was there before is still there afterwards.
    let mut machines = Some(machines.clone());
    for name in ["web1", "new"] {
        let act = Act::Commit(name, memory(&noisy_image(9, 40)));
        act.run_in(&store).saying("the next commit")?;
        machines = act.apply(&machines);
    }
    check_state(&open(files).saying("open again")?, &machines.expect("it was made"))
        .saying(format!("after {acknowledged} acts and the next commit"))
}
