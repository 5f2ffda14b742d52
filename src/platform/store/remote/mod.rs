//! A store in a bucket, through the `object_store` crate, which nothing outside of this directory and `cloud` names.
//!
//! The trait is blocking and the crate is not, so each store has a small runtime of its own on which callers wait.
//! A thread of another such runtime must not wait here: it would stall the tasks it is there to drive. Such a call
//! is refused with an error.

mod explain;
mod flights;
#[cfg(test)]
mod tests;
mod writer;

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;
use object_store::path::Path;
use object_store::{
    Error as RemoteError, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use self::explain::{explain, missing};
pub(super) use self::explain::{innermost, is_about_trust};
use self::flights::{AHEAD_LEN_MAX, Demand, Flights};
use self::writer::RemoteWriter;
use super::cloud::{Reach, Traffic, UPLOAD_WAIT_MAX};
use super::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail, check_key, check_prefix, check_range};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::{self, Stopwatch};
use crate::platform::memory::SpareBuffers;

/// How many keys of a listing are taken at a time, which is what the usual services answer at once.
const LIST_PAGE: usize = 1000;

/// So many reads ahead are on their way at once.
const AHEAD_MAX: usize = 48;

/// What has no answer after so long, and so much longer for each MiB, is asked once more, and a last time when three times as
/// long has passed: a try may have met a server that is just failing, or a connection that leads nowhere any more. Not more than
/// a few at once, so that a slow service is not made slower.
const NEXT_TRY_AFTER: Duration = Duration::from_secs(1);
const NEXT_TRY_MIB: Duration = Duration::from_millis(500);
const NEXT_TRIES_MAX: usize = 4;
const TRIES: u32 = 3;

/// A put of at most so much is tried so, too.
const PUT_AGAIN_LEN_MAX: usize = 4 << 20;

/// A longer one is a part of something large, or as long.
const SMALL_PUT_LEN_MAX: usize = 1 << 20;

/// How long callers wait for what can also be left, where nothing is answered.
const BRIEF_WAIT: Duration = Duration::from_secs(3);

/// It is taken for away when nothing at all was answered for so long; how often that is looked at.
const SILENCE_MAX: Duration = Duration::from_secs(10);
const BRIEF_LOOK: Duration = Duration::from_millis(500);

/// No longer buffer is kept for the next put: a small commit's record fits into it.
const SPARE_LEN_MAX: usize = 4 << 20;

/// How long callers wait unless they say otherwise.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// How long callers wait.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a read, a listing, a small put.
    pub answer: Duration,
    /// For a part of a large object.
    pub part: Duration,
}

impl Patience {
    /// For a store that is asked again for so long.
    pub fn of(patience: Duration) -> Self {
        // Whoever tried last is heard, for what it says is worth more than that time is up.
        let answer = patience + patience / 4 + Duration::from_secs(1);
        Self { answer, part: answer * 2 + UPLOAD_WAIT_MAX }
    }
}

/// A store in a bucket.
pub struct RemoteStore {
    shared: Arc<Shared>,
}

struct Shared {
    remote: Arc<dyn ObjectStore>,
    url: String,
    runtime: Threads,
    counters: Counters,
    patience: Patience,
    traffic: Option<Arc<Traffic>>,
    flights: Flights,
    ahead: Semaphore,
    next_tries: Semaphore,
    is_brief: watch::Sender<bool>,
    /// For what is put.
    spare_buffers: SpareBuffers,
}

/// The runtime, which one of its own tasks may be the last to let go of.
struct Threads(Option<Runtime>);

impl Threads {
    fn get(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

type RemoteResult<T> = std::result::Result<T, RemoteError>;

impl RemoteStore {
    pub fn new(remote: Arc<dyn ObjectStore>, url: impl Into<String>) -> Result<Self> {
        Self::with(remote, url.into(), Patience::of(ANSWER_WAIT), None)
    }

    /// One whose requests somebody counts, for callers who wait so long.
    pub(super) fn with(
        remote: Arc<dyn ObjectStore>,
        url: String,
        patience: Patience,
        traffic: Option<Arc<Traffic>>,
    ) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("remote-store")
            .enable_all()
            .build()
            .map_err(|error| Error::io("cannot start the threads of a remote store", error))?;
        let shared = Shared {
            remote,
            url,
            runtime: Threads(Some(runtime)),
            counters: Counters::default(),
            patience,
            traffic,
            flights: Flights::default(),
            ahead: Semaphore::new(AHEAD_MAX),
            next_tries: Semaphore::new(NEXT_TRIES_MAX),
            is_brief: watch::Sender::new(false),
            spare_buffers: SpareBuffers::new(1, SPARE_LEN_MAX),
        };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl Shared {
    /// Runs the future on this thread while its helpers run on those of the runtime.
    fn wait<F: Future>(&self, future: F) -> Result<F::Output> {
        if Handle::try_current().is_ok() {
            let message = format!("{} was used from within an asynchronous task", self.url);
            return Err(Error::new(Kind::Io, message).hint("call it from a thread of its own"));
        }
        Ok(self.runtime.get().block_on(future))
    }

    /// Waits for an answer, but not for ever.
    async fn answer<T>(
        &self,
        verb: &str,
        key: &str,
        patience: Duration,
        future: impl Future<Output = RemoteResult<T>>,
    ) -> Result<T> {
        match self.within(patience, future).await {
            Ok(answer) => answer.map_err(|error| self.error(verb, key, &error)),
            Err(waited) => Err(self.no_answer(verb, key, waited)),
        }
    }

    /// What comes in time, which is less where nobody waits long any more; or how long was waited.
    async fn within<T>(&self, patience: Duration, future: impl Future<Output = T>) -> std::result::Result<T, Duration> {
        let since = Stopwatch::start();
        let mut brief = self.is_brief.subscribe();
        let is_over = async {
            let briefly = async {
                // The sender lives as long as this does.
                let _ = brief.wait_for(|is_brief| *is_brief).await;
                let answered = || self.traffic.as_ref().map_or(0, |traffic| traffic.answered());
                let (mut before, mut silent) = (answered(), Duration::ZERO);
                loop {
                    let (is_away, nap) = if self.is_away() { (true, BRIEF_WAIT) } else { (false, BRIEF_LOOK) };
                    sleep(nap).await;
                    if is_away && self.is_away() {
                        return;
                    }
                    silent = if answered() == before { silent + nap } else { Duration::ZERO };
                    before = answered();
                    if silent >= SILENCE_MAX {
                        self.traffic.iter().for_each(|traffic| traffic.note_silence(silent));
                        return;
                    }
                }
            };
            let _ = timeout(patience, briefly).await;
        };
        match select(pin!(future), pin!(is_over)).await {
            Either::Left((came, _)) => Ok(came),
            Either::Right(_) => Err(since.elapsed()),
        }
    }

    /// How long a reader waits. Once the service has been away for as long as that, others will find the same, and one after the
    /// other wait less: many have to ask more than once.
    fn read_patience(&self) -> Duration {
        let patience = self.patience.answer;
        let away_since = self.traffic.as_ref().and_then(|traffic| traffic.reach().unreachable_since_ns);
        let away_for = away_since.map(|since| Duration::from_nanos(clock::now_ns().saturating_sub(since)));
        if away_for.is_some_and(|away_for| away_for > patience) { patience / 3 } else { patience }
    }

    /// Whether nothing is answered at present, as far as requests told.
    fn is_away(&self) -> bool {
        self.traffic.as_ref().is_none_or(|traffic| traffic.reach().unreachable_since_ns.is_some())
    }

    fn no_answer(&self, verb: &str, key: &str, waited: Duration) -> Error {
        let last = self.traffic.as_ref().and_then(|traffic| traffic.reach().last_failure);
        let last = last.map_or(String::new(), |last| format!("; the last failure was: {last}"));
        let message = format!("cannot {verb} {key} in {}: no answer within {} s{last}", self.url, waited.as_secs());
        Error::new(Kind::Unavailable, message)
            .hint("check the network and the service; EPOCHFS_STORE_TIMEOUT says how long to wait")
    }

    fn path(&self, key: &str) -> Result<Path> {
        check_key(key)?;
        Path::parse(key).map_err(|error| Error::usage(format!("the key {key:?} is not for {}: {error}", self.url)))
    }

    fn prefix(&self, prefix: &str) -> Result<Option<Path>> {
        check_prefix(prefix)?;
        prefix.strip_suffix('/').map(|prefix| self.path(prefix)).transpose()
    }

    fn error(&self, verb: &str, key: &str, error: &RemoteError) -> Error {
        explain(&self.url, verb, key, error)
    }

    /// The object, or a part of it, with what is known of it.
    async fn get_once(&self, path: &Path, range: Option<GetRange>) -> RemoteResult<(Bytes, Range<u64>, u64)> {
        let options = GetOptions { range, ..GetOptions::default() };
        let result = self.remote.get_opts(path, options).await?;
        let (range, object_len) = (result.range.clone(), result.meta.size);
        Ok((result.bytes().await?, range, object_len))
    }

    /// The same, asked again where it takes too long.
    async fn get(&self, path: &Path, range: Option<GetRange>) -> RemoteResult<(Bytes, Range<u64>, u64)> {
        let len = match &range {
            Some(GetRange::Bounded(range)) => range.end - range.start,
            Some(_) => 0,
            None => return self.get_once(path, None).await,
        };
        self.asked_again(path.as_ref(), len, || self.get_once(path, range.clone())).await
    }

    /// Asks, and once more beside it where there is no answer for long; the first that says something is heard. A try that fails
    /// because of the way leaves it to the others.
    async fn asked_again<T, F>(&self, key: &str, len: u64, ask: impl Fn() -> F) -> RemoteResult<T>
    where
        F: Future<Output = RemoteResult<T>>,
    {
        let mib = u32::try_from(len >> 20).unwrap_or(u32::MAX);
        let mut after = NEXT_TRY_AFTER.saturating_add(NEXT_TRY_MIB.saturating_mul(mib));
        let mut tries = FuturesUnordered::from_iter([ask()]);
        let mut permits = Vec::new();
        let mut last = None;
        for _ in 1..TRIES {
            match timeout(after, first_said(&mut tries, &mut last)).await {
                Ok(said) => return said,
                Err(_) => after *= 2,
            }
            let Ok(permit) = self.next_tries.try_acquire() else { break };
            permits.push(permit);
            tracing::debug!(key, "an answer takes long: asking again");
            tries.push(ask());
        }
        first_said(&mut tries, &mut last).await
    }

    /// Bytes of an object, which must be as many as it said.
    async fn body(
        &self,
        key: &str,
        path: &Path,
        range: Option<GetRange>,
    ) -> std::result::Result<(Bytes, Range<u64>, u64), GetError> {
        let patience = self.read_patience();
        let started = Stopwatch::start();
        let (bytes, range, object_len) = loop {
            match self.within(patience, self.get(path, range.clone())).await {
                Ok(Ok(got)) => break got,
                // An answer that broke off, for one: not all of them are asked for again below.
                Ok(Err(error)) if started.elapsed() < patience / 4 && self.may_be_mended(key, &error) => {
                    sleep(Duration::from_millis(50)).await;
                }
                Ok(Err(error)) => return Err(GetError::Remote(error)),
                Err(waited) => return Err(GetError::Told(self.no_answer("read", key, waited))),
            }
        };
        let expected = range.end - range.start;
        if bytes.len() as u64 != expected {
            let (url, got) = (&self.url, bytes.len());
            let message = format!("object {key} in {url} is shorter than it said: {got} of {expected} bytes");
            return Err(GetError::Told(Error::damaged(message)));
        }
        self.counters.get(expected);
        Ok((bytes, range, object_len))
    }

    fn may_be_mended(&self, key: &str, error: &RemoteError) -> bool {
        self.error("read", key, error).kind() == Kind::Unavailable
    }

    /// Fetches a part of an object that is not empty, as far as the object goes.
    async fn fetch(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let path = self.path(key)?;
        let (bytes, got, object_len) = match self.body(key, &path, Some(GetRange::Bounded(range.clone()))).await {
            Ok(body) => body,
            Err(GetError::Told(error)) => return Err(error),
            Err(GetError::Remote(error)) => {
                let told = self.error("read", key, &error);
                // A service reports a range that begins after the end in words of its own. The length tells.
                if told.kind() == Kind::Io
                    && let Some(len) = self.len(key).await?
                    && range.start >= len
                {
                    return Ok(Bytes::new());
                }
                return Err(told);
            }
        };
        if got != (range.start..range.end.min(object_len)) {
            return Err(Error::new(Kind::Io, format!("{} answered with {got:?} of {key} for {range:?}", self.url)));
        }
        Ok(bytes)
    }

    async fn len(&self, key: &str) -> Result<Option<u64>> {
        let path = self.path(key)?;
        match self.within(self.read_patience(), self.asked_again(key, 0, || self.remote.head(&path))).await {
            Ok(Ok(meta)) => Ok(Some(meta.size)),
            Ok(Err(RemoteError::NotFound { .. })) => Ok(None),
            Ok(Err(error)) => Err(self.error("look at", key, &error)),
            Err(waited) => Err(self.no_answer("look at", key, waited)),
        }
    }

    /// The length of an object that must exist.
    async fn len_of(&self, key: &str) -> Result<u64> {
        self.len(key).await?.ok_or_else(|| missing(&self.url, key))
    }

    async fn put(&self, key: &str, payload: PutPayload, mode: PutMode) -> Result<Put> {
        let path = self.path(key)?;
        let len = payload.content_length() as u64;
        let once = || self.remote.put_opts(&path, payload.clone(), mode.clone().into());
        // One that replaces is not repeated beside itself: it could arrive after another.
        let is_asked_again = matches!(mode, PutMode::Create) && payload.content_length() <= PUT_AGAIN_LEN_MAX;
        let since = Stopwatch::start();
        loop {
            let put = async {
                match is_asked_again {
                    true => self.asked_again(key, len, once).await,
                    false => once().await,
                }
            };
            let is_small = payload.content_length() <= SMALL_PUT_LEN_MAX;
            let patience = if is_small { self.patience.answer } else { self.patience.part };
            let put = match self.within(patience, put).await {
                Ok(Ok(_)) => Put::Created,
                // Some services also say so of a key that two are just writing, and of which nobody is yet.
                Ok(Err(RemoteError::AlreadyExists { .. } | RemoteError::Precondition { .. })) => {
                    if self.len(key).await?.is_none() {
                        if since.elapsed() > patience {
                            return Err(self.no_answer("write", key, since.elapsed()));
                        }
                        sleep(Duration::from_millis(20) + since.elapsed() / 8).await;
                        continue;
                    }
                    Put::Exists
                }
                Ok(Err(error)) => return Err(self.error("write", key, &error)),
                Err(waited) => return Err(self.no_answer("write", key, waited)),
            };
            self.counters.put(len);
            return Ok(put);
        }
    }
}

/// The first answer that says something of the object, whether it is there or not; or the last failure, when no try is left.
async fn first_said<T, F>(tries: &mut FuturesUnordered<F>, last: &mut Option<RemoteError>) -> RemoteResult<T>
where
    F: Future<Output = RemoteResult<T>>,
{
    while let Some(answer) = tries.next().await {
        match answer {
            Err(error) if !is_about_object(&error) => *last = Some(error),
            said => return said,
        }
    }
    Err(last.take().expect("there was a try, and it failed"))
}

/// Whether an error is the service's word on an object.
fn is_about_object(error: &RemoteError) -> bool {
    matches!(error, RemoteError::NotFound { .. } | RemoteError::AlreadyExists { .. } | RemoteError::Precondition { .. })
}

enum GetError {
    Remote(RemoteError),
    Told(Error),
}

impl Store for RemoteStore {
    fn url(&self) -> String {
        self.shared.url.clone()
    }

    fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn traffic(&self) -> Option<super::TrafficTotals> {
        self.shared.traffic.as_ref().map(|traffic| traffic.totals())
    }

    fn reach(&self) -> Reach {
        self.shared.traffic.as_ref().map(|traffic| traffic.reach()).unwrap_or_default()
    }

    fn distrust(&self, key: &str) -> bool {
        self.shared.flights.forget(key);
        // They came a long way.
        true
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        let path = self.shared.path(key)?;
        match self.shared.wait(self.shared.body(key, &path, None))? {
            Ok((bytes, ..)) => Ok(bytes),
            Err(GetError::Told(error)) => Err(error),
            Err(GetError::Remote(error)) => Err(self.shared.error("read", key, &error)),
        }
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let shared = &self.shared;
        if range.is_empty() {
            // No service answers to an empty range.
            let len = shared.wait(shared.len_of(key))??;
            shared.counters.get(0);
            return check_range(key, || shared.url.clone(), &range, len).map(|()| Bytes::new());
        }
        let bytes = self.get_within(key, range.clone())?;
        if (bytes.len() as u64) < range.end - range.start {
            // How long it is need not be asked where it ends within the range.
            let len =
                if bytes.is_empty() { shared.wait(shared.len_of(key))?? } else { range.start + bytes.len() as u64 };
            check_range(key, || shared.url.clone(), &range, len)?;
        }
        Ok(bytes)
    }

    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let shared = &self.shared;
        if range.is_empty() {
            return shared.wait(shared.len_of(key))?.map(|_| Bytes::new());
        }
        if range.end - range.start > AHEAD_LEN_MAX {
            return shared.wait(shared.fetch(key, range))?;
        }
        match shared.flights.demand(key, &range) {
            Demand::Here(bytes) => Ok(bytes),
            Demand::Fetch(ticket) => {
                let fetched = shared.wait(shared.fetch(key, range)).and_then(|fetched| fetched);
                shared.flights.land(key, ticket, fetched.as_ref().ok().cloned());
                fetched
            }
        }
    }

    fn will_need(&self, key: &str, range: Range<u64>) {
        if range.is_empty() || range.end - range.start > AHEAD_LEN_MAX {
            return;
        }
        let Some(ticket) = self.shared.flights.foresee(key, &range) else { return };
        let (shared, key) = (self.shared.clone(), key.to_owned());
        self.shared.runtime.get().spawn(async move {
            let Ok(_permit) = shared.ahead.acquire().await else { return };
            if shared.flights.depart(&key, ticket) {
                // Whoever reads it finds out what is wrong.
                let fetched = shared.fetch(&key, range).await.ok();
                shared.flights.land(&key, ticket, fetched);
            }
        });
    }

    fn be_brief(&self) {
        self.shared.is_brief.send_replace(true);
    }

    fn get_tail(&self, key: &str, tail_len: u64) -> Result<Tail> {
        let shared = &self.shared;
        let path = shared.path(key)?;
        if tail_len > 0 {
            match shared.wait(shared.body(key, &path, Some(GetRange::Suffix(tail_len))))? {
                Ok((bytes, _, object_len)) => return Ok(Tail { bytes, object_len }),
                Err(GetError::Told(error)) => return Err(error),
                Err(GetError::Remote(error)) => {
                    let told = shared.error("read", key, &error);
                    if told.kind() != Kind::Io {
                        return Err(told);
                    }
                    // Some services have no suffix ranges, and some refuse them for an empty object.
                }
            }
        }
        let object_len = shared.wait(shared.len_of(key))??;
        let bytes = self.get_range(key, object_len.saturating_sub(tail_len)..object_len)?;
        Ok(Tail { bytes, object_len })
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.shared.wait(self.shared.len(key))?
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        let mut bytes = self.shared.spare_buffers.take();
        bytes.reserve_exact(parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        let bytes = Bytes::from(bytes);
        let put = self.shared.wait(self.shared.put(key, bytes.clone().into(), PutMode::Create));
        // A try that was given up may have it still.
        if let Ok(mut bytes) = bytes.try_into_mut() {
            bytes.clear();
            self.shared.spare_buffers.put_back(bytes.into());
        }
        put?
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let shared = &self.shared;
        shared.flights.forget(key);
        let payload = PutPayload::from(Bytes::copy_from_slice(bytes));
        let replaced = shared.wait(shared.put(key, payload, PutMode::Overwrite))?;
        // What was read meanwhile may be what was there before.
        shared.flights.forget(key);
        replaced.map(|_| ())
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(RemoteWriter::new(Arc::clone(&self.shared), key)?))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        let shared = &self.shared;
        let path = shared.prefix(prefix)?;
        shared.counters.list();
        // The service skips what it can; where `after` is no key, the check below does.
        let offset = after.and_then(|after| Path::parse(after).ok()).filter(|offset| Some(offset.as_ref()) == after);
        // In pages, so that `each` runs outside of the runtime and may use this store.
        let first_page = || {
            let stream = match &offset {
                Some(offset) => shared.remote.list_with_offset(path.as_ref(), offset),
                None => shared.remote.list(path.as_ref()),
            };
            let mut pages = stream.ready_chunks(LIST_PAGE);
            async move {
                let mut first = pages.next().await;
                // A page that begins with a failure says nothing.
                if let Some(metas) = first.as_mut().filter(|metas| metas.first().is_some_and(|meta| meta.is_err())) {
                    metas.swap_remove(0)?;
                }
                Ok((first, pages))
            }
        };
        let first = shared.asked_again(prefix, 0, first_page);
        let first = shared.wait(shared.within(shared.read_patience(), first))?;
        let no_answer = |waited| shared.no_answer("list", prefix, waited);
        let (mut page, mut pages) = first.map_err(no_answer)?.map_err(|error| shared.error("list", prefix, &error))?;
        let mut last: Option<String> = None;
        while let Some(metas) = page {
            for meta in metas {
                let ObjectMeta { location, size, .. } = meta.map_err(|error| shared.error("list", prefix, &error))?;
                let key = location.to_string();
                if after.is_some_and(|after| key.as_str() <= after) || !key.starts_with(prefix) {
                    continue;
                }
                if last.as_ref().is_some_and(|last| *last >= key) {
                    let message = format!("{} lists {key} out of order", shared.url);
                    return Err(Error::new(Kind::Io, message).hint("use a service that lists objects in byte order"));
                }
                last = Some(key.clone());
                if !each(ObjectInfo { key, len: size })? {
                    return Ok(());
                }
            }
            let next = shared.wait(shared.within(shared.patience.answer, pages.next()))?;
            page = next.map_err(no_answer)?;
        }
        Ok(())
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        let shared = &self.shared;
        let path = shared.prefix(prefix)?;
        shared.counters.list();
        let listed = shared.asked_again(prefix, 0, || shared.remote.list_with_delimiter(path.as_ref()));
        let listed = shared.wait(shared.answer("list", prefix, shared.read_patience(), listed))??;
        let name = |dir: &Path| dir.as_ref().strip_prefix(prefix).map(str::to_owned);
        let mut names: Vec<String> = listed.common_prefixes.iter().filter_map(name).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn delete(&self, key: &str) -> Result<()> {
        let shared = &self.shared;
        let path = shared.path(key)?;
        shared.flights.forget(key);
        let deleted = shared.wait(shared.within(shared.patience.answer, shared.remote.delete(&path)))?;
        shared.flights.forget(key);
        match deleted {
            Ok(Ok(()) | Err(RemoteError::NotFound { .. })) => Ok(()),
            Ok(Err(error)) => Err(shared.error("delete", key, &error)),
            Err(waited) => Err(shared.no_answer("delete", key, waited)),
        }
    }
}
