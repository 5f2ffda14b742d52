//! A moment of a guest's memory, on its way to become an epoch.

use std::ops::Range;
use std::sync::Arc;

use epochfs_format::{Attributes, PAGE_SIZE};

use super::audit::Expected;
use super::capturing::{Facts, SharedState};
use super::frozen::Frozen;
use super::memory::PAGE;
use super::pages::PageSet;
use crate::epoch::{CommitBuilder, Ranges, Source};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;

/// The pages that changed since the last durable epoch, as they were at one moment.
///
/// Dropping it gives them back: the next moment has them, as they are then.
pub struct Moment {
    frozen: Arc<Frozen>,
    state: SharedState,
    taken: Option<PageSet>,
    base: Option<u64>,
    missed: Vec<u64>,
    expected: Option<Expected>,
    facts: Facts,
}

impl Moment {
    pub(super) fn new(
        frozen: Arc<Frozen>,
        state: SharedState,
        taken: PageSet,
        missed: Vec<u64>,
        expected: Option<Expected>,
    ) -> Self {
        let base = lock(&state).base;
        Self { frozen, state, taken: Some(taken), base, missed, expected, facts: Facts::default() }
    }

    pub(super) fn taken(&self) -> &PageSet {
        self.taken.as_ref().expect("a moment has its pages until it is over")
    }

    pub(super) fn set_facts(&mut self, facts: Facts) {
        self.facts = facts;
    }

    /// What the pause did.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The epoch that all other pages are as in: the parent of the commit. None: all other pages are zeros.
    pub fn base(&self) -> Option<u64> {
        self.base
    }

    /// All other pages are as in this epoch, too: it was made of an earlier moment of this guest, whose commit seemed to
    /// fail and did not. A moment without a base stays one.
    pub fn rebase(&mut self, epoch: u64) {
        self.base = self.base.map(|_| epoch);
    }

    /// Pages that changed without the tracker telling of it; only an audit knows. They are in the moment.
    pub fn missed(&self) -> &[u64] {
        &self.missed
    }

    /// What every page must be in the epoch; only an audit knows.
    pub fn expected(&self) -> Option<&Expected> {
        self.expected.as_ref()
    }

    /// The dirty pages, in bytes of the stream.
    pub fn dirty(&self) -> Ranges {
        Ranges::new(self.taken().runs().map(|run| run.start * PAGE..run.end * PAGE).collect())
    }

    /// Adds the memory to a commit. Costs what the dirty pages cost.
    pub fn add_to(&self, commit: &mut CommitBuilder, stream: &[u8]) -> Result<()> {
        let attributes = Attributes { mode: 0o600, ..Attributes::default() };
        match self.base {
            None => commit.add_stream(stream, attributes, self, None),
            Some(base) if commit.parent() == base => commit.add_stream(stream, attributes, self, Some(&self.dirty())),
            Some(base) => {
                let newest = commit.parent();
                Err(Error::conflict(format!(
                    "the guest is as in epoch {base} but for dirty pages, and not as in {newest}"
                ))
                .hint("nothing was committed: what changed since another epoch would be missed"))
            }
        }
    }

    /// The epoch is durable: the pages are clean, but for what was written to since.
    pub fn durable(mut self, epoch: u64) {
        self.taken = None;
        self.frozen.release();
        let mut state = lock(&self.state);
        state.base = Some(epoch);
        state.is_out = false;
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        let Some(taken) = self.taken.take() else { return };
        self.frozen.release();
        let mut state = lock(&self.state);
        state.pending.insert_all(&taken);
        state.is_out = false;
    }
}

impl Source for Moment {
    fn name(&self) -> String {
        "the guest's memory".to_owned()
    }

    fn len(&self) -> u64 {
        self.frozen.memory.len()
    }

    /// Pages that are not of the moment are zeros, where there is no base to take them from.
    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        Ok(self.taken().next_run(from / PAGE).map(|run| (run.start * PAGE).max(from)..run.end * PAGE))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (pages, rest) = buffer.as_chunks_mut::<PAGE_SIZE>();
        if !offset.is_multiple_of(PAGE) || !rest.is_empty() {
            return Err(Error::new(Kind::Io, "a guest's memory is read in whole pages"));
        }
        self.frozen.take(offset / PAGE, pages)
    }
}
