//! What storing a machine's newest epoch once more would bring: quicker restores, and room once older epochs are gone.

use std::sync::Arc;

use epochfs_format::ObjectRef;

use super::collector::Collector;
use crate::epoch::{EpochName, Moves, Survey};
use crate::error::Result;

/// What is to be stored again of a machine's newest epoch.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CompactPlan {
    pub machine: String,
    pub epoch: u64,
    /// How many objects its bytes lie in, and how many bytes they are.
    pub objects: u64,
    pub bytes: u64,
    /// Those of them that are moved out of.
    pub moved_objects: u64,
    pub moved_bytes: u64,
    /// Epochs of which something was read to know what else needs its packs.
    pub epochs_walked: u64,
    #[serde(skip)]
    pub moves: Arc<Moves>,
}

impl Collector {
    /// Finds what is scattered over many small objects, or lies in packs of which nobody needs the rest. `progress` is told
    /// how many epochs of how many were marked.
    pub fn plan_compaction(&mut self, machine: &Arc<str>, progress: &mut dyn FnMut(u64, u64)) -> Result<CompactPlan> {
        let store = self.store().clone();
        let epoch = store.epoch(&EpochName { machine: machine.clone(), which: None })?;
        let survey = Survey::of(&epoch)?;
        let marked = self.mark_without(machine, epoch.number(), progress)?;
        self.look_for_lengths()?;
        let moves = survey.choose(&|id| self.len_of(id), &|id| marked.live.contains(&ObjectRef::Pack(*id)))?;
        let (objects, bytes) = (survey.used.len() as u64, survey.used.values().sum());
        let moved = survey.used.iter().filter(|(object, _)| moves.is_from(object));
        let (moved_objects, moved_bytes) = moved.fold((0, 0), |(count, sum), (_, used)| (count + 1, sum + used));
        Ok(CompactPlan {
            machine: machine.to_string(),
            epoch: epoch.number(),
            objects,
            bytes,
            moved_objects,
            moved_bytes,
            epochs_walked: marked.epochs_walked,
            moves: Arc::new(moves),
        })
    }
}
