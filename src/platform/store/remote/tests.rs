//! The contract over memory, and what is special about waiting.

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
