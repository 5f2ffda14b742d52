//! A guest's memory from an epoch, read when it is touched.

use std::sync::Arc;

use epochfs_format::{Image, PAGE_SIZE, Page};

use super::faults::Backing;
use super::memory::PAGE;
use crate::epoch::{Epoch, SharedImage};
use crate::error::{Error, Result};
use crate::restore::{Extent, Prefetch, Prefetcher, Residency, Sink, Target};

/// A stream of an epoch.
pub struct EpochPages {
    epoch: Epoch,
    image: Image,
    stream: Arc<[u8]>,
    /// What the guest touched and was given.
    residency: Arc<Residency>,
}

impl EpochPages {
    pub fn new(epoch: Epoch, stream: &[u8]) -> Result<Self> {
        let image = epoch.image(stream)?.clone();
        if !image.length.is_multiple_of(PAGE) {
            let (name, len) = (epoch.name(), image.length);
            return Err(Error::usage(format!(
                "{} of {name} has {len} bytes, and is no guest's memory",
                stream.escape_ascii()
            )));
        }
        let residency = Arc::new(Residency::new(image.length));
        Ok(Self { epoch, image, stream: stream.into(), residency })
    }

    /// The length of the memory.
    #[allow(clippy::len_without_is_empty)] // A guest's memory never is.
    pub fn len(&self) -> u64 {
        self.image.length
    }

    pub fn epoch(&self) -> &Epoch {
        &self.epoch
    }

    /// Has what earlier restores needed brought to the guest before it asks, and what it asks for recorded for later ones.
    pub fn prefetch(&self, prefetcher: &Prefetcher, sink: Arc<dyn Sink>) -> Arc<Prefetch> {
        let Self { epoch, image, stream, residency } = self;
        let target = Target {
            epoch: epoch.clone(),
            stream: stream.clone(),
            image: image.clone(),
            residency: residency.clone(),
            sink,
        };
        prefetcher.begin(target, Extent::Forecast)
    }
}

impl Drop for EpochPages {
    fn drop(&mut self) {
        // The guest is gone, and takes no more pages.
        self.residency.close();
    }
}

impl Backing for EpochPages {
    fn read(&self, page: u64, content: &mut Page) -> Result<()> {
        self.residency.demand(page..page + 1);
        let image = SharedImage { nodes: self.epoch.nodes(), image: &self.image };
        let len = image.read_at(page * PAGE, content)?;
        content[len.min(PAGE_SIZE)..].fill(0);
        Ok(())
    }
}
