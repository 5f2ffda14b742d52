//! A store in a bucket, through the `object_store` crate, which nothing else in the program names.
//!
//! The trait is blocking and the crate is not, so each store has a small runtime of its own on which callers wait.
//! A thread of another such runtime must not wait here: it would stall the tasks it is there to drive. Such a call
//! is refused with an error.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{
    Error as RemoteError, GetOptions, GetRange, GetResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutPayload,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinSet;

use super::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail, check_key, check_prefix, check_range};
use crate::error::{Error, Kind, Result};

/// The size of the parts of a large object, and of the largest object that is put at once. The usual limit of ten
/// thousand parts allows objects of 80 GB.
const PART_LEN: usize = 8 << 20;

/// How many parts of one object are on their way at once.
const PARTS_MAX: usize = 4;

/// How many keys of a listing are taken at a time, which is what the usual services answer at once.
const LIST_PAGE: usize = 1000;

/// A store in a bucket.
pub struct RemoteStore {
    shared: Arc<Shared>,
}

struct Shared {
    remote: Arc<dyn ObjectStore>,
    url: String,
    runtime: Runtime,
    counters: Counters,
}

impl RemoteStore {
    pub fn new(remote: Arc<dyn ObjectStore>, url: impl Into<String>) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("remote-store")
            .enable_all()
            .build()
            .map_err(|error| Error::io("cannot start the threads of a remote store", error))?;
        Ok(Self { shared: Arc::new(Shared { remote, url: url.into(), runtime, counters: Counters::default() }) })
    }

    /// Opens the object, or the part of it that the store answers with.
    fn open(&self, key: &str, range: Option<GetRange>) -> Result<std::result::Result<GetResult, RemoteError>> {
        let path = self.shared.path(key)?;
        let options = GetOptions { range, ..GetOptions::default() };
        self.shared.wait(self.shared.remote.get_opts(&path, options))
    }

    fn body(&self, key: &str, result: GetResult) -> Result<Bytes> {
        let expected = result.range.end - result.range.start;
        let bytes = self.shared.wait(result.bytes())?.map_err(|error| self.shared.error("read", key, error))?;
        if bytes.len() as u64 != expected {
            let (url, got) = (&self.shared.url, bytes.len());
            return Err(Error::damaged(format!(
                "object {key} in {url} is shorter than it said: {got} of {expected} bytes"
            )));
        }
        self.shared.counters.get(expected);
        Ok(bytes)
    }

    /// The length of an object that must exist.
    fn len_of(&self, key: &str) -> Result<u64> {
        self.len(key)?.ok_or_else(|| self.shared.missing(key))
    }
}

impl Shared {
    /// Runs the future on this thread while its helpers run on those of the runtime.
    fn wait<F: Future>(&self, future: F) -> Result<F::Output> {
        if Handle::try_current().is_ok() {
            let message = format!("{} was used from within an asynchronous task", self.url);
            return Err(Error::new(Kind::Io, message).hint("call it from a thread of its own"));
        }
        Ok(self.runtime.block_on(future))
    }

    fn path(&self, key: &str) -> Result<Path> {
        check_key(key)?;
        Path::parse(key).map_err(|error| Error::usage(format!("the key {key:?} is not for {}: {error}", self.url)))
    }

    fn prefix(&self, prefix: &str) -> Result<Option<Path>> {
        check_prefix(prefix)?;
        prefix.strip_suffix('/').map(|prefix| self.path(prefix)).transpose()
    }

    fn missing(&self, key: &str) -> Error {
        Error::not_found(format!("there is no object {key} in {}", self.url))
    }

    fn error(&self, verb: &str, key: &str, error: RemoteError) -> Error {
        let hint = match &error {
            RemoteError::NotFound { .. } if verb == "read" => return self.missing(key),
            RemoteError::PermissionDenied { .. } | RemoteError::Unauthenticated { .. } => {
                Some("check the credentials and what they allow in that bucket")
            }
            RemoteError::NotImplemented { .. } | RemoteError::NotSupported { .. } => {
                Some("the service must refuse to overwrite an object when it is asked to")
            }
            _ => None,
        };
        let told = Error::io(format!("cannot {verb} {key} in {}", self.url), std::io::Error::other(error));
        match hint {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }

    fn put(&self, key: &str, payload: PutPayload, mode: PutMode) -> Result<Put> {
        let path = self.path(key)?;
        let len = payload.content_length() as u64;
        let put = match self.wait(self.remote.put_opts(&path, payload, mode.into()))? {
            Ok(_) => Put::Created,
            Err(RemoteError::AlreadyExists { .. } | RemoteError::Precondition { .. }) => Put::Exists,
            Err(error) => return Err(self.error("write", key, error)),
        };
        self.counters.put(len);
        Ok(put)
    }
}

impl Store for RemoteStore {
    fn url(&self) -> String {
        self.shared.url.clone()
    }

    fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        let result = self.open(key, None)?.map_err(|error| self.shared.error("read", key, error))?;
        self.body(key, result)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            // No service answers to an empty range.
            let len = self.len_of(key)?;
            self.shared.counters.get(0);
            return check_range(key, || self.shared.url.clone(), &range, len).map(|()| Bytes::new());
        }
        let result = match self.open(key, Some(GetRange::Bounded(range.clone())))? {
            Ok(result) => result,
            // A service reports a range that begins after the end in words of its own. The length tells.
            Err(error) if !matches!(error, RemoteError::NotFound { .. }) => {
                if let Some(len) = self.len(key)? {
                    check_range(key, || self.shared.url.clone(), &range, len)?;
                }
                return Err(self.shared.error("read", key, error));
            }
            Err(error) => return Err(self.shared.error("read", key, error)),
        };
        check_range(key, || self.shared.url.clone(), &range, result.meta.size)?;
        if result.range != range {
            let (url, got) = (&self.shared.url, &result.range);
            return Err(Error::new(Kind::Io, format!("{url} answered with {got:?} of {key} for {range:?}")));
        }
        self.body(key, result)
    }

    fn get_tail(&self, key: &str, tail_len: u64) -> Result<Tail> {
        if tail_len > 0 {
            match self.open(key, Some(GetRange::Suffix(tail_len)))? {
                Ok(result) => {
                    let object_len = result.meta.size;
                    return Ok(Tail { bytes: self.body(key, result)?, object_len });
                }
                Err(error @ RemoteError::NotFound { .. }) => return Err(self.shared.error("read", key, error)),
                // Some services have no suffix ranges, and some refuse them for an empty object.
                Err(_) => {}
            }
        }
        let object_len = self.len_of(key)?;
        let bytes = self.get_range(key, object_len.saturating_sub(tail_len)..object_len)?;
        Ok(Tail { bytes, object_len })
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        let path = self.shared.path(key)?;
        match self.shared.wait(self.shared.remote.head(&path))? {
            Ok(meta) => Ok(Some(meta.size)),
            Err(RemoteError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.shared.error("read", key, error)),
        }
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        let payload = parts.iter().map(|part| Bytes::copy_from_slice(part)).collect();
        self.shared.put(key, payload, PutMode::Create)
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        let path = self.shared.path(key)?;
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(RemoteWriter { shared, key: key.to_owned(), path, part: Vec::new(), len: 0, upload: Upload::None }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        let path = self.shared.prefix(prefix)?;
        self.shared.counters.list();
        // The service skips what it can; where `after` is no key, the check below does.
        let offset = after.and_then(|after| Path::parse(after).ok()).filter(|offset| Some(offset.as_ref()) == after);
        let stream = match &offset {
            Some(offset) => self.shared.remote.list_with_offset(path.as_ref(), offset),
            None => self.shared.remote.list(path.as_ref()),
        };
        // In pages, so that `each` runs outside of the runtime and may use this store.
        let mut pages = stream.ready_chunks(LIST_PAGE);
        let mut last: Option<String> = None;
        while let Some(page) = self.shared.wait(pages.next())? {
            for meta in page {
                let ObjectMeta { location, size, .. } =
                    meta.map_err(|error| self.shared.error("list", prefix, error))?;
                let key = location.to_string();
                if after.is_some_and(|after| key.as_str() <= after) || !key.starts_with(prefix) {
                    continue;
                }
                if last.as_ref().is_some_and(|last| *last >= key) {
                    let message = format!("{} lists {key} out of order", self.shared.url);
                    return Err(Error::new(Kind::Io, message).hint("use a service that lists objects in byte order"));
                }
                last = Some(key.clone());
                if !each(ObjectInfo { key, len: size })? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        let path = self.shared.prefix(prefix)?;
        self.shared.counters.list();
        let listed = self.shared.wait(self.shared.remote.list_with_delimiter(path.as_ref()))?;
        let listed = listed.map_err(|error| self.shared.error("list", prefix, error))?;
        let name = |dir: &Path| dir.as_ref().strip_prefix(prefix).map(str::to_owned);
        let mut names: Vec<String> = listed.common_prefixes.iter().filter_map(name).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn delete(&self, key: &str) -> Result<()> {
        let path = self.shared.path(key)?;
        match self.shared.wait(self.shared.remote.delete(&path))? {
            Ok(()) | Err(RemoteError::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.shared.error("delete", key, error)),
        }
    }
}

/// Gathers parts and uploads several at once.
struct RemoteWriter {
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
        parts: JoinSet<std::result::Result<(), RemoteError>>,
    },
    /// Aborted after an error.
    Failed,
}

impl RemoteWriter {
    /// Sends a full part on its way, and waits while too many are.
    fn send_part(&mut self) -> Result<()> {
        let payload = PutPayload::from(std::mem::take(&mut self.part));
        if matches!(self.upload, Upload::None) {
            let started = self.shared.wait(self.shared.remote.put_multipart(&self.path))?;
            let upload = started.map_err(|error| self.shared.error("write", &self.key, error))?;
            self.upload = Upload::Running { upload, parts: JoinSet::new() };
        }
        let Upload::Running { upload, parts } = &mut self.upload else { return Err(self.failed_before()) };
        let part = upload.put_part(payload);
        let sent = self.shared.wait(async {
            parts.spawn(part);
            join(parts, PARTS_MAX - 1).await
        })?;
        sent.map_err(|error| self.shared.error("write", &self.key, error))
    }

    fn complete(&mut self) -> Result<()> {
        if matches!(self.upload, Upload::None) {
            // Nobody else uses the name, so repeating the put writes the same bytes again and hides nothing.
            let payload = PutPayload::from(std::mem::take(&mut self.part));
            return self.shared.put(&self.key, payload, PutMode::Overwrite).map(|_| ());
        }
        if !self.part.is_empty() {
            self.send_part()?;
        }
        let Upload::Running { upload, parts } = &mut self.upload else { return Err(self.failed_before()) };
        let completed = self.shared.wait(async {
            join(parts, 0).await?;
            upload.complete().await
        })?;
        completed.map_err(|error| self.shared.error("write", &self.key, error))?;
        self.upload = Upload::None;
        self.shared.counters.put(self.len);
        Ok(())
    }

    /// Tells the service to forget the parts. What it does not hear of, its rules for unfinished uploads remove.
    fn abort(&mut self) {
        if let Upload::Running { mut upload, parts } = std::mem::replace(&mut self.upload, Upload::Failed) {
            let aborted = self.shared.wait(async move {
                drop(parts);
                upload.abort().await
            });
            if let Ok(Err(error)) = aborted {
                tracing::debug!(key = self.key, %error, "an unfinished upload stays in the bucket");
            }
        }
    }

    fn failed_before(&self) -> Error {
        Error::new(Kind::Io, format!("cannot write {} in {}: an earlier part failed", self.key, self.shared.url))
    }
}

/// Waits until no more than so many parts are left.
async fn join(
    parts: &mut JoinSet<std::result::Result<(), RemoteError>>,
    left_max: usize,
) -> std::result::Result<(), RemoteError> {
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

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::platform::store::contract;

    fn store() -> RemoteStore {
        RemoteStore::new(Arc::new(InMemory::new()), "memory:///").unwrap()
    }

    #[test]
    fn keeps_the_contract() {
        let store: Arc<dyn Store> = Arc::new(store());
        contract::check(&store);
        assert_eq!(store.url(), "memory:///");
    }

    #[test]
    fn refuses_a_call_from_a_task_instead_of_stalling_it() {
        let (ours, theirs) = (Arc::new(store()), Arc::new(store()));
        let inner = Arc::clone(&ours);
        let error = theirs.shared.wait(async move { inner.get("a") }).unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.next_step().is_some());
    }

    #[test]
    fn many_threads_may_stream_at_once() {
        let store = Arc::new(store());
        let bytes = contract::random_bytes(3, (9 << 20) + 7);
        std::thread::scope(|scope| {
            for number in 0..6 {
                let (store, bytes) = (&store, &bytes);
                scope.spawn(move || {
                    let key = format!("s/{number}");
                    let mut writer = store.writer(&key).unwrap();
                    bytes.chunks(100_000).for_each(|piece| writer.append(piece).unwrap());
                    writer.finish().unwrap();
                    assert!(store.get(&key).unwrap() == *bytes);
                });
            }
        });
    }
}
