//! A guest's memory from an epoch, read when it is touched.

use epochfs_format::{EntryKind, Image, PAGE_SIZE, Page};

use super::faults::Backing;
use super::memory::PAGE;
use crate::epoch::{Epoch, SharedImage};
use crate::error::{Error, Result};

/// A stream of an epoch.
pub struct EpochPages {
    epoch: Epoch,
    image: Image,
}

impl EpochPages {
    pub fn new(epoch: Epoch, stream: &[u8]) -> Result<Self> {
        let image = match epoch.manifest().get(stream).map(|entry| &entry.kind) {
            Some(EntryKind::Stream(image)) => image.clone(),
            _ => {
                return Err(Error::not_found(format!("{} has no stream {}", epoch.name(), stream.escape_ascii()))
                    .hint(format!("`epochfs show {}` lists its streams", epoch.name())));
            }
        };
        if !image.length.is_multiple_of(PAGE) {
            let (name, len) = (epoch.name(), image.length);
            return Err(Error::usage(format!(
                "{} of {name} has {len} bytes, and is no guest's memory",
                stream.escape_ascii()
            )));
        }
        Ok(Self { epoch, image })
    }

    /// The length of the memory.
    #[allow(clippy::len_without_is_empty)] // A guest's memory never is.
    pub fn len(&self) -> u64 {
        self.image.length
    }

    pub fn epoch(&self) -> &Epoch {
        &self.epoch
    }
}

impl Backing for EpochPages {
    fn read(&self, page: u64, content: &mut Page) -> Result<()> {
        let image = SharedImage { nodes: self.epoch.nodes(), image: &self.image };
        let len = image.read_at(page * PAGE, content)?;
        content[len.min(PAGE_SIZE)..].fill(0);
        Ok(())
    }
}
