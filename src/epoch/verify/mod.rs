//! Verifying a repository: every object is read whole, every page proven, every reference followed.

mod damage;
mod machines;
mod names;
mod objects;
mod state;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{Hash, ObjectRef, PageDecoder, Place};

use super::view::EpochStore;
use crate::error::Result;
use crate::repo::{Head, machines};

pub(super) use damage::Damage;
pub(super) use names::{Named, name_of};
pub(super) use objects::read_object;
use state::Saving;

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// The object or epoch concerned.
    pub object: String,
    pub problem: String,
}

/// An epoch that cannot be read whole.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BrokenEpoch {
    pub machine: String,
    pub epoch: u64,
    /// The stream concerned, or nothing when it is the epoch itself.
    pub stream: Option<String>,
    /// Pages of the stream that cannot be read, as far as they were reached.
    pub pages: u64,
    /// Where they are, as far as they fit in a thousand ranges.
    pub ranges: Vec<PageRange>,
    pub problem: String,
}

/// Pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PageRange {
    pub first: u64,
    pub pages: u64,
}

/// What a verification found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Verified {
    pub objects: u64,
    pub bytes: u64,
    pub pages: u64,
    pub machines: u64,
    pub epochs: u64,
    /// Damage in objects, whether an epoch needs what is damaged or not.
    pub problems: Vec<Problem>,
    pub broken_epochs: Vec<BrokenEpoch>,
    /// Objects that no format knows: left alone.
    pub unknown_objects: Vec<String>,
    /// Bytes that an earlier verification had read, where this one went on.
    pub resumed_at_bytes: u64,
}

impl Verified {
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty() && self.broken_epochs.is_empty()
    }
}

/// Where a verification notes how far it has come, so that another one can go on there.
#[derive(Clone, Debug)]
pub struct VerifyProgress {
    /// A file of this host's state of the repository.
    pub file: PathBuf,
    /// Go on where an earlier verification was interrupted, if one was; otherwise begin anew.
    pub resume: bool,
    /// How often to note it. What was read since is read again.
    pub every: Duration,
}

/// A verification on its way.
pub(super) struct Verifier<'a> {
    store: &'a EpochStore,
    /// What the objects came to that were read.
    read: Verified,
    /// What following trees came to.
    trees: Verified,
    /// What is wrong with objects, by their keys.
    problems: BTreeMap<String, Vec<Problem>>,
    decoder: PageDecoder,
    damage: Damage,
    /// Nodes that were walked, with how many unreadable pages lie below.
    walked: HashMap<(Place, Hash, u8), u64>,
    /// The epoch that is being walked.
    walking: Option<(Arc<str>, u64)>,
    on_bytes: &'a mut dyn FnMut(u64, u64),
    total: u64,
}

impl EpochStore {
    /// Reads and checks everything. `on_bytes` is told how many bytes of how many were read.
    pub fn verify(&self, on_bytes: &mut dyn FnMut(u64, u64)) -> Result<Verified> {
        self.verify_from(None, on_bytes)
    }

    /// The same, with notes of how far it has come.
    pub fn verify_from(
        &self,
        progress: Option<&VerifyProgress>,
        on_bytes: &mut dyn FnMut(u64, u64),
    ) -> Result<Verified> {
        let mut verifier = Verifier::new(self, on_bytes);
        let heads = verifier.heads()?;
        let mut saving = progress.map(|progress| Saving::begin(progress, self.repository().id()));
        verifier.check_objects(&mut saving)?;
        let verified = verifier.check_machines(heads)?;
        if let Some(saving) = &mut saving {
            saving.finish();
        }
        Ok(verified)
    }
}

/// The machines with a log, and what its newest record is.
pub(super) type Heads = Vec<(Arc<str>, Result<Option<Head>>)>;

impl<'a> Verifier<'a> {
    pub fn new(store: &'a EpochStore, on_bytes: &'a mut dyn FnMut(u64, u64)) -> Self {
        Self {
            store,
            read: Verified::default(),
            trees: Verified::default(),
            problems: BTreeMap::new(),
            decoder: PageDecoder::new(),
            damage: Damage::default(),
            walked: HashMap::new(),
            walking: None,
            on_bytes,
            total: 0,
        }
    }

    /// The logs as they are before the objects are listed: whatever an epoch refers to that is in one now is in the listing
    /// that follows.
    pub fn heads(&self) -> Result<Heads> {
        let mut heads = Vec::new();
        for machine in machines(self.store.repository().objects())? {
            heads.push((machine.clone(), self.store.repository().log_head(&machine)));
        }
        Ok(heads)
    }

    /// What is damaged, as far as objects were read and trees were followed.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }

    fn problem(&mut self, key: &str, object: impl Into<String>, problem: impl ToString) {
        let problem = Problem { object: object.into(), problem: problem.to_string() };
        self.problems.entry(key.to_owned()).or_default().push(problem);
    }

    /// Whether a block is what its object's footer says.
    fn is_bad(&self, object: &ObjectRef, block: (u32, u32)) -> bool {
        self.damage.is_bad(object, block)
    }
}
