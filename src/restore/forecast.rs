//! What a restore will need, as far as anybody can tell: its trace, or else what the latest epochs changed.

use std::ops::Range;

use epochfs_format::{Image, TraceRun};

use super::bits::PageBits;
use super::traces::Traces;
use crate::epoch::{Epoch, EpochStore, changed_pages, page_count, push_range};
use crate::error::Result;

/// Where a forecast comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Earlier restores.
    Trace,
    /// Pages that the latest epochs changed, and their neighbours.
    Changes,
    Nothing,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Changes => "changes",
            Self::Nothing => "nothing",
        }
    }
}

/// Pages in the order in which they should be there.
pub struct Forecast {
    pub source: Source,
    pub runs: Vec<Range<u64>>,
    /// How many restores the trace was made of.
    pub restores: u32,
    /// Where else the pages lie, by the packs' ids.
    pub windows: Vec<[u8; 16]>,
}

/// Epochs that are looked back upon where there is no trace, and pages that are taken from them.
const EPOCHS_BACK: usize = 4;
const CHANGED_PAGES_MAX: u64 = 16 << 10;

/// Pages that lie together in blocks of this many are needed together.
const NEIGHBOURS: u64 = 16;

pub fn forecast(
    store: &EpochStore,
    traces: &Traces,
    epoch: &Epoch,
    stream: &[u8],
    image: &Image,
    is_in_vain: &dyn Fn() -> bool,
) -> Forecast {
    let pages = page_count(image.length);
    if let Some(trace) = traces.of(epoch, stream) {
        let runs = trace.runs.iter().map(TraceRun::pages).map(|run| run.start.min(pages)..run.end.min(pages));
        let runs = runs.filter(|run| !run.is_empty()).collect();
        return Forecast { source: Source::Trace, runs, restores: trace.restores, windows: trace.windows };
    }
    let runs = changes(store, epoch, stream, image, is_in_vain).unwrap_or_else(|error| {
        tracing::info!(epoch = epoch.name(), "what the latest epochs changed is not known: {error}");
        Vec::new()
    });
    let source = if runs.is_empty() { Source::Nothing } else { Source::Changes };
    Forecast { source, runs, restores: 0, windows: Vec::new() }
}

/// The pages that the latest epochs changed, the newest first, and then those beside them.
fn changes(
    store: &EpochStore,
    epoch: &Epoch,
    stream: &[u8],
    image: &Image,
    is_in_vain: &dyn Fn() -> bool,
) -> Result<Vec<Range<u64>>> {
    let pages = page_count(image.length);
    let (seen, mut runs, mut count) = (PageBits::new(pages), Vec::new(), 0);
    let mut newer = epoch.clone();
    let mut newer_image = image.clone();
    for _ in 0..EPOCHS_BACK {
        let parent = newer.commit().parent;
        if parent == 0 || count >= CHANGED_PAGES_MAX || is_in_vain() {
            break;
        }
        let opening = store.opening()?;
        let older = store.open(store.repository().epoch_record(newer.machine(), parent)?, &opening)?;
        let Some(older_image) = older.manifest().stream(stream).cloned() else {
            break;
        };
        changed_pages(newer.nodes(), &older_image, &newer_image, &mut |page| {
            if count < CHANGED_PAGES_MAX {
                seen.add(page..page + 1, &mut |run| {
                    count += 1;
                    push_range(&mut runs, run);
                });
            }
        })?;
        (newer, newer_image) = (older, older_image);
    }
    for at in 0..runs.len() {
        let Range { start, end } = runs[at];
        let around = start / NEIGHBOURS * NEIGHBOURS..end.next_multiple_of(NEIGHBOURS).min(pages);
        seen.add(around, &mut |run| push_range(&mut runs, run));
    }
    Ok(runs)
}
