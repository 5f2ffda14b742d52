//! What is served: one stream of one epoch.

use std::sync::Arc;

use crate::epoch::{Epoch, StreamReader};
use crate::error::{Error, Result};
use crate::restore::{Residency, Sink, Target};

/// A stream of an epoch, to be opened by many threads.
pub struct Image {
    epoch: Epoch,
    stream: Vec<u8>,
    len: u64,
}

impl Image {
    pub fn new(epoch: Epoch, stream: &[u8]) -> Result<Self> {
        let len = epoch.stream(stream)?.len();
        if len == 0 {
            return Err(Error::usage(format!("{} of {} is empty", stream.escape_ascii(), epoch.name())));
        }
        Ok(Self { epoch, stream: stream.to_owned(), len })
    }

    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The stream's pages, the last of which may be cut off.
    pub fn pages(&self) -> u64 {
        self.len.div_ceil(epochfs_format::PAGE_SIZE as u64)
    }

    /// In words, for logs.
    pub fn name(&self) -> String {
        format!("{} of {}", self.stream.escape_ascii(), self.epoch.name())
    }

    pub fn reader(&self) -> StreamReader {
        self.epoch.stream(&self.stream).expect("it was opened before, and an epoch does not change")
    }

    /// What a prefetch needs to know of it.
    pub(super) fn target(&self, residency: Arc<Residency>, sink: Arc<dyn Sink>) -> Option<Target> {
        let image = self.epoch.manifest().stream(&self.stream)?.clone();
        Some(Target { epoch: self.epoch.clone(), stream: self.stream.as_slice().into(), image, residency, sink })
    }
}
