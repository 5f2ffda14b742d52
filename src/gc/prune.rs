//! Pruning: a policy applied to a machine's epochs.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::leases::held_by_readers;
use super::retention::{Dated, Policy, Verdict};
use crate::epoch::{CopyOf, EpochStore, commit_of};
use crate::error::Result;

/// What becomes of a machine's epochs, the newest first.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Pruned {
    pub machine: String,
    pub epochs: Vec<Verdict>,
}

impl Pruned {
    pub fn dropped(&self) -> BTreeSet<u64> {
        self.epochs.iter().filter(|verdict| !verdict.kept).map(|verdict| verdict.epoch).collect()
    }
}

/// Judges a machine's epochs. What is tagged stays, and so does what somebody reads just now.
pub fn judge_machine(store: &EpochStore, machine: &Arc<str>, policy: &Policy) -> Result<Pruned> {
    let head = store.repository().require(machine)?;
    let state = store.repository().state(&head, &mut |_, _| {})?;
    let held = held_by_readers(store.repository().objects())?;
    let mut epochs = Vec::new();
    for record in state.epochs.values() {
        let mut pinned_by: Vec<String> =
            state.list.tags_of(record.seq).iter().map(|tag| format!("tag {tag}")).collect();
        let reader = held.iter().find(|(of, epoch, _)| of == machine && *epoch == record.seq);
        pinned_by.extend(reader.map(|(_, _, host)| format!("read by {host}")));
        // A copy is as old as its original.
        let of = CopyOf::read(&commit_of(record)?.notes);
        let time_ns = of.map_or(record.time_ns, |of| of.time_ns);
        epochs.push(Dated { epoch: record.seq, time_ns, pinned_by });
    }
    Ok(Pruned { machine: machine.to_string(), epochs: policy.judge(&epochs) })
}
