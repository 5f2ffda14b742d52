//! The contract over memory, and what is special about waiting.

use std::fmt::{Display, Formatter};
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{CopyOptions, GetResult, ListResult, MultipartUpload, PutMultipartOptions, PutOptions, PutResult};

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

/// A bucket in memory of which some requests are done and never answered.
#[derive(Debug, Default)]
struct Mute {
    inner: InMemory,
    /// So many requests from now on.
    unanswered: AtomicU32,
}

impl Mute {
    fn is_answered(&self) -> bool {
        self.unanswered.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }

    async fn answer<T>(&self, answer: T) -> T {
        if !self.is_answered() {
            std::future::pending::<()>().await;
        }
        answer
    }
}

impl Display for Mute {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("mute")
    }
}

#[async_trait]
impl ObjectStore for Mute {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> RemoteResult<PutResult> {
        let answer = self.inner.put_opts(path, payload, options).await;
        self.answer(answer).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> RemoteResult<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> RemoteResult<GetResult> {
        let answer = self.inner.get_opts(path, options).await;
        self.answer(answer).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, RemoteResult<Path>>) -> BoxStream<'static, RemoteResult<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, RemoteResult<ObjectMeta>> {
        match self.is_answered() {
            true => self.inner.list(prefix),
            false => futures_util::stream::pending().boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> RemoteResult<ListResult> {
        let answer = self.inner.list_with_delimiter(prefix).await;
        self.answer(answer).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> RemoteResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// A request whose answer is lost costs a moment, whatever it asks for.
#[test]
fn what_is_not_answered_is_asked_again() {
    let mute = Arc::new(Mute::default());
    let store = RemoteStore::new(mute.clone(), "mute:///").unwrap();
    let timed = |lost: u32, what: &str, ask: &dyn Fn()| {
        mute.unanswered.store(lost, Ordering::Relaxed);
        let since = Stopwatch::start();
        ask();
        let (took, least) = (since.elapsed(), NEXT_TRY_AFTER * (2_u32.pow(lost) - 1));
        assert!(took >= least && took < least + NEXT_TRY_AFTER, "{what}, {lost} lost: {took:?}");
    };
    for (lost, key) in [(0, "d/0"), (1, "d/1"), (2, "d/2")] {
        let put = match lost {
            0 => Put::Created,
            // The lost one was done, and whoever cares finds out that it was his.
            _ => Put::Exists,
        };
        timed(lost, "put", &|| assert_eq!(store.put_if_absent(key, &[b"one"]).unwrap(), put));
        timed(lost, "get", &|| assert_eq!(store.get_range(key, 0..3).unwrap(), "one"));
        timed(lost, "tail", &|| assert_eq!(store.get_tail(key, 2).unwrap().bytes, "ne"));
        timed(lost, "len", &|| assert_eq!(store.len(key).unwrap(), Some(3)));
        timed(lost, "list", &|| {
            assert!(crate::platform::store::keys_below(&store, "d/").unwrap().contains(&key.into()))
        });
        timed(lost, "list_dirs", &|| assert_eq!(store.list_dirs("").unwrap(), ["d"]));
    }
    // Nobody waits for ever.
    let patience = Patience { answer: Duration::from_millis(200), part: Duration::from_millis(200) };
    let hasty = RemoteStore::with(mute.clone(), "mute:///".to_owned(), patience, None).unwrap();
    mute.unanswered.store(u32::MAX, Ordering::Relaxed);
    assert_eq!(hasty.put_if_absent("d/9", &[b"one"]).unwrap_err().kind(), Kind::Unavailable);
}
