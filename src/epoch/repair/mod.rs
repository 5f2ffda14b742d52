//! Repairing: what is damaged is put in place again from other copies, and what has none is quarantined.
//!
//! An object is never changed but for this: in the place of one that is not what it was, the same one is put again, whole,
//! in one step. Every block that was sound stays byte for byte as it was. A damaged one is replaced by one of the same
//! kind, place and length: a page that has the hash that the footer says, a node that has the digest and, byte for byte,
//! the places that it had. So nothing that refers to the object, and nobody who reads it meanwhile, can tell it from what
//! was written.
//!
//! A pack is put in place only while a reader's lease holds an epoch that needs it: what a collector deletes is needed by
//! none, so it does not come back, and no late delete finds it.

mod blocks;
mod donors;
mod flips;
mod nodes;
mod object;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use epochfs_format::{BlockKind, ObjectRef, PageDecoder, SUMMARY_STEP, log_prefix, summary_key};

use super::verify::{Damage, Verified, Verifier};
use super::view::EpochStore;
use crate::error::{Kind, Result};
use crate::platform::store::Cache;
use crate::repo::{Hold, Opening, Summing, object_key};
use donors::Donors;
use object::{Rebuilt, rebuild};

/// Where other copies may be.
#[derive(Default)]
pub struct RepairSources {
    /// Other repositories: copies of this one, byte for byte or made by copying epochs.
    pub from: Vec<EpochStore>,
    /// What this host keeps of the repository, if it is in a bucket.
    pub cache: Option<Arc<Cache>>,
}

/// A block that was damaged and is what it was, or would be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RepairedBlock {
    pub object: String,
    pub offset: u32,
    pub kind: &'static str,
    /// Where the other copy was.
    pub from: String,
}

/// A block, or an object, of which no other copy was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Lost {
    pub object: String,
    /// The block's offset; nothing if it is the object itself.
    pub offset: Option<u32>,
    pub problem: String,
}

/// What a repair came to.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Repaired {
    pub found: Verified,
    /// Whether anything was changed, or only looked for.
    pub is_applied: bool,
    pub repaired_objects: Vec<String>,
    pub repaired_blocks: Vec<RepairedBlock>,
    pub lost: Vec<Lost>,
    /// Blocks that no commit takes a page from any more.
    pub quarantined_blocks: u64,
    /// What is left.
    pub left: Verified,
}

/// What is repaired may show more of what is damaged below it. A tree has no more levels than that.
const ROUNDS_MAX: usize = 10;

pub(super) fn name_of_kind(kind: BlockKind) -> &'static str {
    match kind {
        BlockKind::Page => "page",
        BlockKind::Node => "node",
        BlockKind::Patch => "patch",
        BlockKind::Record => "record",
        BlockKind::Footer => "footer",
    }
}

impl EpochStore {
    /// Looks for all that is damaged and for other copies of it; with `apply`, puts these in place, and quarantines what has
    /// none. `on_bytes` is told how many bytes of how many were read.
    pub fn repair(&self, sources: &RepairSources, apply: bool, on_bytes: &mut dyn FnMut(u64, u64)) -> Result<Repaired> {
        let mut verifier = Verifier::new(self, on_bytes);
        let heads = verifier.heads()?;
        verifier.check_objects(&mut None)?;
        let found = verifier.check_machines(heads)?;
        let mut repaired = Repaired { left: found.clone(), found, is_applied: apply, ..Repaired::default() };
        for _ in 0..ROUNDS_MAX {
            let round = self.repair_round(verifier.damage(), sources, apply)?;
            let changed: Vec<ObjectRef> = round.changed.keys().cloned().collect();
            let has_changed = !changed.is_empty() || !round.summaries.is_empty();
            repaired.take(&round);
            if !apply || !has_changed {
                break;
            }
            changed.iter().try_for_each(|object| verifier.check_again(object))?;
            round.summaries.iter().try_for_each(|(machine, to)| verifier.check_summary_again(machine, *to))?;
            let heads = verifier.heads()?;
            repaired.left = verifier.check_machines(heads)?;
        }
        if apply {
            repaired.quarantined_blocks = self.quarantine(verifier.damage())?;
            // They are written anew, those that were damaged as well.
            if verifier.forget_lists() {
                let heads = verifier.heads()?;
                repaired.left = verifier.check_machines(heads)?;
            }
        }
        Ok(repaired)
    }

    fn repair_round(&self, damage: &Damage, sources: &RepairSources, apply: bool) -> Result<Round> {
        let mut round = Round::default();
        let mut decoder = PageDecoder::new();
        let (_opening, holds, wanted) = self.needed(damage, &mut round)?;
        let mut donors = Donors::new(self, sources, damage);
        donors.look_for(&wanted, &mut decoder)?;
        for object in wanted {
            match rebuild(&object, &donors, &mut decoder)? {
                Rebuilt::Whole => {}
                Rebuilt::Lost(lost) => round.lost.extend(lost),
                Rebuilt::Anew { bytes, blocks, lost } => {
                    if apply {
                        self.repository().objects().replace(&object, &bytes)?;
                        // It may have kept what was damaged.
                        if let Some(cache) = &sources.cache {
                            cache.forget(&object_key(&object));
                        }
                        tracing::info!(object = object_key(&object), "repaired");
                    }
                    round.changed.insert(object, blocks);
                    round.lost.extend(lost);
                }
            }
        }
        drop(holds);
        self.repair_summaries(damage, apply, &mut round)?;
        Ok(round)
    }

    /// Of what is damaged, what an epoch needs, and records; with holds of these epochs, as long as what they need is put in
    /// place. As long as the opening is there, no record is emptied that was not condemned before.
    fn needed(&self, damage: &Damage, round: &mut Round) -> Result<(Opening, Vec<Hold>, BTreeSet<ObjectRef>)> {
        let opening = self.opening()?;
        let log = self.repository().collector_log();
        log.heed_newest()?;
        let condemned = log.dead();
        let (mut holds, mut held) = (Vec::new(), BTreeMap::new());
        let mut wanted = BTreeSet::new();
        for object in damage.objects() {
            let is_record = matches!(object, ObjectRef::Record { .. });
            if is_record && condemned.contains(&object) {
                let problem = "a collection is about to empty it: repeat this when `epochfs gc run` is done".into();
                round.lost.push(Lost { object: object_key(&object), offset: None, problem });
                continue;
            }
            let Some((machine, epoch)) = damage.needed.get(&object) else {
                if is_record {
                    wanted.insert(object);
                    continue;
                }
                let problem =
                    "no epoch that can be followed needs it: `epochfs gc run` takes it away, if none does".into();
                round.lost.push(Lost { object: object_key(&object), offset: None, problem });
                continue;
            };
            let name = (machine.clone(), *epoch);
            let is_held = match held.get(&name) {
                Some(is_held) => *is_held,
                None => {
                    let exists = match self.repository().epoch_record(machine, *epoch) {
                        Ok(_) => true,
                        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => false,
                        Err(error) => return Err(error),
                    };
                    if exists {
                        holds.push(self.hold(machine, *epoch));
                    }
                    held.insert(name, exists);
                    exists
                }
            };
            if is_held || is_record {
                wanted.insert(object);
            }
        }
        Ok((opening, holds, wanted))
    }

    /// Summaries are made of the log, and the same whoever makes them.
    fn repair_summaries(&self, damage: &Damage, apply: bool, round: &mut Round) -> Result<()> {
        let objects = self.repository().objects();
        let of: BTreeSet<&Arc<str>> = damage.summaries.iter().map(|(machine, _)| machine).collect();
        for machine in of {
            let mut summing = Summing::default();
            let mut made = Vec::new();
            let replayed = self.repository().log_head(machine).and_then(|head| match head {
                None => Ok(()),
                Some(head) => self
                    .repository()
                    .replay(&head, &mut |record, digest| {
                        let summary = summing.add(record, digest);
                        let wanted = |to| damage.summaries.contains(&(machine.clone(), to));
                        made.extend(summary.filter(|summary| wanted(summary.to)).cloned());
                    })
                    .map(|_| ()),
            });
            match replayed {
                Err(error) if error.kind().is_of_object() => {
                    let problem = format!("summaries are made of the log, which is damaged: {error}");
                    round.lost.push(Lost { object: log_prefix(machine), offset: None, problem });
                }
                other => other?,
            }
            for summary in made {
                debug_assert!(summary.to.is_multiple_of(SUMMARY_STEP));
                if apply {
                    let bytes = summary.encode(objects.repository());
                    objects.store().replace(&summary_key(machine, summary.to), &bytes)?;
                }
                round.summaries.push((machine.clone(), summary.to));
            }
        }
        Ok(())
    }

    /// Lists what is damaged, so that no commit takes a page from there.
    fn quarantine(&self, damage: &Damage) -> Result<u64> {
        let mut all: BTreeMap<ObjectRef, BTreeSet<(u32, u32)>> = damage.pages.clone();
        for (object, blocks) in &damage.blocks {
            all.entry(object.clone()).or_default().extend(blocks);
        }
        let all: Vec<(ObjectRef, Vec<(u32, u32)>)> =
            all.into_iter().map(|(object, blocks)| (object, apart(blocks))).collect();
        self.repository().objects().quarantine(&all)
    }
}

/// Blocks that do not overlap: what a damaged node or a hostile one says of places may be anything.
fn apart(blocks: BTreeSet<(u32, u32)>) -> Vec<(u32, u32)> {
    let mut apart: Vec<(u32, u32)> = Vec::new();
    for (offset, len) in blocks {
        if apart.last().is_none_or(|(before, before_len)| before.saturating_add(*before_len) <= offset) {
            apart.push((offset, len));
        }
    }
    apart
}

/// What one look at all that is damaged came to.
#[derive(Default)]
struct Round {
    changed: BTreeMap<ObjectRef, Vec<RepairedBlock>>,
    summaries: Vec<(Arc<str>, u64)>,
    lost: Vec<Lost>,
}

impl Repaired {
    fn take(&mut self, round: &Round) {
        for (object, blocks) in &round.changed {
            let key = object_key(object);
            if !self.repaired_objects.contains(&key) {
                self.repaired_objects.push(key);
            }
            self.repaired_blocks.extend(blocks.iter().cloned());
        }
        let summaries = round.summaries.iter().map(|(machine, to)| summary_key(machine, *to));
        self.repaired_objects.extend(summaries);
        // What an earlier round could not repair, this one may.
        self.lost.clone_from(&round.lost);
    }
}
