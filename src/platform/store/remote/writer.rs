//! Large objects: gathered in parts, several of which are on their way at once while the next is filled.

use std::sync::Arc;
use std::time::Duration;

use object_store::path::Path;
use object_store::{Error as RemoteError, MultipartUpload, ObjectStoreExt, PutMode, PutPayload};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{RemoteResult, Shared};
use crate::error::{Error, Kind, Result};
use crate::platform::store::ObjectWriter;

/// The size of the parts of a large object, and of the largest object that is put at once. The usual limit of ten
/// thousand parts allows objects of 80 GB.
const PART_LEN: usize = 8 << 20;

/// How many parts of one object are on their way at once.
const PARTS_MAX: usize = 4;

/// How long a failed upload is told to be forgotten: where the service is away, nobody wants to wait for that too.
const ABORT_WAIT: Duration = Duration::from_secs(2);

/// Gathers parts and uploads several at once.
pub(super) struct RemoteWriter {
    shared: Arc<Shared>,
    key: String,
    path: Path,
    part: Vec<u8>,
    len: u64,
    upload: Upload,
}

enum Upload {
    None,
    Running {
        upload: Box<dyn MultipartUpload>,
        parts: JoinSet<RemoteResult<()>>,
    },
    /// Aborted after an error.
    Failed,
}

impl RemoteWriter {
    pub fn new(shared: Arc<Shared>, key: &str) -> Result<Self> {
        let path = shared.path(key)?;
        Ok(Self { shared, key: key.to_owned(), path, part: Vec::new(), len: 0, upload: Upload::None })
    }

    /// Sends a full part on its way, and waits while too many are.
    fn send_part(&mut self) -> Result<()> {
        let payload = PutPayload::from(std::mem::take(&mut self.part));
        if matches!(self.upload, Upload::None) {
            let (shared, patience) = (&self.shared, self.shared.patience.answer);
            let started = shared.answer("write", &self.key, patience, shared.remote.put_multipart(&self.path));
            let upload = shared.wait(started)??;
            self.upload = Upload::Running { upload, parts: JoinSet::new() };
        }
        let Upload::Running { upload, parts } = &mut self.upload else { return Err(self.failed_before()) };
        let part = upload.put_part(payload);
        let sent = async {
            parts.spawn(part);
            join(parts, PARTS_MAX - 1).await
        };
        let sent = self.shared.answer("write", &self.key, self.shared.patience.part, sent);
        self.shared.wait(sent)?
    }

    fn complete(&mut self) -> Result<()> {
        if matches!(self.upload, Upload::None) {
            // Nobody else uses the name, so repeating the put writes the same bytes again and hides nothing.
            let payload = PutPayload::from(std::mem::take(&mut self.part));
            return self.shared.wait(self.shared.put(&self.key, payload, PutMode::Overwrite))?.map(|_| ());
        }
        if !self.part.is_empty() {
            self.send_part()?;
        }
        let Upload::Running { upload, parts } = &mut self.upload else { return Err(self.failed_before()) };
        let shared = &self.shared;
        let sent = shared.answer("write", &self.key, shared.patience.part, join(parts, 0));
        shared.wait(sent)??;
        let completed = shared.answer("write", &self.key, shared.patience.part, upload.complete());
        if let Err(error) = shared.wait(completed)? {
            // The answer to a completion that arrived may have been lost, and then a second one finds nothing to complete.
            if shared.wait(shared.len(&self.key))?.ok().flatten() != Some(self.len) {
                return Err(error);
            }
        }
        self.upload = Upload::None;
        self.shared.counters.put(self.len);
        Ok(())
    }

    /// Tells the service to forget the parts. What it does not hear of, its rules for unfinished uploads remove.
    fn abort(&mut self) {
        if let Upload::Running { mut upload, parts } = std::mem::replace(&mut self.upload, Upload::Failed) {
            let aborted = self.shared.wait(async move {
                drop(parts);
                timeout(ABORT_WAIT, upload.abort()).await
            });
            match aborted {
                Ok(Ok(Ok(()))) | Err(_) => {}
                Ok(outcome) => tracing::debug!(key = self.key, ?outcome, "an unfinished upload stays in the bucket"),
            }
        }
    }

    fn failed_before(&self) -> Error {
        Error::new(Kind::Io, format!("cannot write {} in {}: an earlier part failed", self.key, self.shared.url))
    }
}

/// Waits until no more than so many parts are left.
async fn join(parts: &mut JoinSet<RemoteResult<()>>, left_max: usize) -> RemoteResult<()> {
    while parts.len() > left_max {
        if let Some(joined) = parts.join_next().await {
            joined.map_err(|error| RemoteError::Generic { store: "upload", source: Box::new(error) })??;
        }
    }
    Ok(())
}

impl ObjectWriter for RemoteWriter {
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        if matches!(self.upload, Upload::Failed) {
            return Err(self.failed_before());
        }
        self.len += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.part.len() == PART_LEN {
                self.send_part().inspect_err(|_| self.abort())?;
            }
            let taken = bytes.len().min(PART_LEN - self.part.len());
            self.part.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        if matches!(self.upload, Upload::Failed) {
            return Err(self.failed_before());
        }
        self.complete()
    }
}

impl Drop for RemoteWriter {
    fn drop(&mut self) {
        self.abort();
    }
}
