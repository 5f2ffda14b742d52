//! Epochs that are looked at one after the other: what each of them changed is read beforehand, for several at a time, of a store
//! that is far away. Whoever looks at them then finds their nodes at hand.

use std::collections::VecDeque;

use epochfs_format::{Commit, Manifest, ManifestPlace, Record};

use super::diff::changed_pages;
use super::leaf::LEAF_LEN;
use super::nodes::Nodes;
use super::view::commit_of;
use crate::error::Result;
use crate::platform::at_once::{AT_ONCE, at_once};

/// No more nodes are read beforehand, of each side, than are surely kept until they are looked at.
const NODES_MAX: u64 = 256;

pub struct Foresight<'a> {
    nodes: &'a Nodes,
    epochs: Vec<u64>,
    record: Box<dyn Fn(u64) -> Option<Record> + Sync + 'a>,
    /// So many of the epochs were looked at beforehand, or left, and this is the last of them.
    reached: usize,
    last: Option<Record>,
    /// What those behind it are, as far as it is known.
    next: VecDeque<Option<Record>>,
}

impl<'a> Foresight<'a> {
    /// These epochs will be looked at, in this order. `record` says what each is, if it can.
    pub fn new(
        nodes: &'a Nodes,
        epochs: impl Iterator<Item = u64>,
        record: impl Fn(u64) -> Option<Record> + Sync + 'a,
    ) -> Self {
        let epochs = if nodes.objects().store().is_remote() { epochs.collect() } else { Vec::new() };
        Self { nodes, epochs, record: Box::new(record), reached: 0, last: None, next: VecDeque::new() }
    }

    /// The one at this place in the row comes next.
    pub fn reach(&mut self, at: usize) {
        if at < self.reached || at >= self.epochs.len() {
            return;
        }
        self.next.drain(..(at - self.reached).min(self.next.len()));
        if self.next.is_empty() {
            let part = &self.epochs[at..(at + AT_ONCE).min(self.epochs.len())];
            self.next = at_once(true, part, &|epoch| Ok((self.record)(*epoch))).unwrap_or_default().into();
        }
        // Of one that changed much its nodes are read when it is looked at, many at a time as well.
        let mut nodes = 0;
        let fits = |record: &&Option<Record>| {
            nodes += record.as_ref().and_then(|record| commit_of(record).ok()).map_or(0, changed_leaves);
            nodes <= NODES_MAX
        };
        let fitting = self.next.iter().take_while(fits).count();
        let before = std::iter::once(&self.last).chain(&self.next);
        let pairs = before.zip(self.next.iter().take(fitting));
        let pairs: Vec<[&Record; 2]> =
            pairs.filter_map(|(before, record)| changed_from(before.as_ref()?, record.as_ref()?)).collect();
        drop(at_once(true, &pairs, &|[before, record]| self.read_changed(before, record)));
        self.reached = at + fitting.max(1);
        self.last = self.next.drain(..fitting.max(1).min(self.next.len())).next_back().flatten();
    }

    /// Reads the nodes by which an epoch differs from the one before. Whoever looks at it is told what is wrong.
    fn read_changed(&self, before: &Record, record: &Record) -> Result<()> {
        let (before, Some(manifest)) = (manifest_of(before), manifest_of(record)) else { return Ok(()) };
        for (path, image) in manifest.streams() {
            if let Some(old) = before.and_then(|before| before.stream(path)) {
                changed_pages(self.nodes, old, image, &mut |_| {})?;
            }
        }
        Ok(())
    }
}

/// Both, where it is known how much one changed of the other: what lies between others is not what it changed.
fn changed_from<'r>(before: &'r Record, record: &'r Record) -> Option<[&'r Record; 2]> {
    (commit_of(record).ok()?.parent == before.seq).then_some([before, record])
}

/// In how many leaves an epoch may differ from the one before.
fn changed_leaves(commit: &Commit) -> u64 {
    commit.changed_pages.min(commit.logical_len / LEAF_LEN + 1)
}

/// What an epoch has, where its record says it.
fn manifest_of(record: &Record) -> Option<&Manifest> {
    match &commit_of(record).ok()?.manifest {
        ManifestPlace::Inline(manifest) => Some(manifest),
        ManifestPlace::Image(_) => None,
    }
}
