//! P3: one writer at a time, on a service that really runs. Each racer has a store of its own, as a host would.

use std::sync::Barrier;

use epochfs::Kind;
use epochfs::epoch::{BytesSource, CommitOptions, EpochStore};
use epochfs_format::{Attributes, Body, Owner};

use crate::server::{ceph, is_long};
use crate::world::Host;

fn owner(number: u8) -> Owner {
    Owner { host: [number; 16], name: format!("host{number}"), lease_ms: 0 }
}

fn race<T: Send>(stores: &[EpochStore], work: impl Fn(u8, &EpochStore) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(stores.len());
    let (work, barrier) = (&work, &barrier);
    std::thread::scope(|scope| {
        let racers: Vec<_> = stores
            .iter()
            .zip(1..)
            .map(|(store, number)| {
                scope.spawn(move || {
                    barrier.wait();
                    work(number, store)
                })
            })
            .collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    })
}

fn commit(store: &EpochStore, options: CommitOptions, text: &str) -> epochfs::Result<u64> {
    let mut commit = store.begin_commit("web1", options)?;
    commit.add_stream(b"memory", Attributes::default(), &BytesSource::new("m", text.as_bytes()), None)?;
    commit.finish().map(|committed| committed.epoch)
}

/// Two owners race for a machine again and again, and commit at once: each term has one owner, and only it commits.
#[test]
fn p3_of_two_owners_racing_for_a_machine_exactly_one_wins_each_time() {
    let Some(server) = ceph("two owners race") else { return };
    let host = Host::new(&server);
    let stores = [host.open(), host.open()];
    stores[0].create_machine("web1").unwrap();
    let rounds = if is_long() { 1000 } else { 40 };
    let (mut lost, mut fenced) = (0, 0);
    for round in 0..rounds {
        let outcomes = race(&stores, |number, store| {
            let owned = store.own(&"web1".into(), owner(number), true);
            owned.and_then(|owned| {
                let options = CommitOptions { term: Some(owned.term), ..CommitOptions::default() };
                commit(store, options, &format!("{round} {number}")).map(|epoch| (owned.term, epoch))
            })
        });
        for outcome in &outcomes {
            match outcome.as_ref().map_err(epochfs::Error::kind) {
                Ok(_) => {}
                Err(Kind::Conflict) => lost += 1,
                Err(Kind::Fenced) => fenced += 1,
                Err(_) => panic!("round {round}: {outcomes:?}"),
            }
        }
        assert!(outcomes.iter().any(Result::is_ok), "round {round}: nobody won: {outcomes:?}");
    }
    // The log is the judge: terms rise by one, and each commit is of the owner of its term.
    let head = stores[0].repository().log_head(&"web1".into()).unwrap().unwrap();
    stores[0].repository().state(&head, &mut |_, _| {}).unwrap();
    let (mut term, mut holder, mut commits) = (0, None, 0);
    for seq in 1..=head.record.seq {
        let (record, _) = stores[1].repository().objects().record(&"web1".into(), seq).unwrap().unwrap();
        match record.body {
            Body::Term => {
                assert_eq!(record.term, term + 1, "record {seq}");
                holder.clone_from(&record.owner);
            }
            Body::Commit(_) => {
                assert_eq!((record.term, &record.owner), (term, &holder), "record {seq}");
                commits += 1;
            }
            _ => {}
        }
        term = record.term;
    }
    assert!(commits >= rounds, "{commits} commits in {rounds} rounds");
    eprintln!("{rounds} races of two owners: {commits} commits, {lost} lost the race for the term, {fenced} fenced");
}

#[test]
fn p3_of_several_writers_with_the_same_parent_exactly_one_wins() {
    let Some(server) = ceph("several writers with the same parent") else { return };
    let host = Host::new(&server);
    let stores: Vec<EpochStore> = (0..8).map(|_| host.open()).collect();
    for round in 0..if is_long() { 200 } else { 10 } {
        let outcomes = race(&stores, |number, store| {
            commit(
                store,
                CommitOptions { parent: Some(round), ..CommitOptions::default() },
                &format!("{round} {number}"),
            )
        });
        let won: Vec<u64> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok().copied()).collect();
        assert_eq!(won, [round + 1], "{outcomes:?}");
        assert!(outcomes.iter().all(|outcome| outcome.as_ref().map_err(epochfs::Error::kind) != Err(Kind::Io)));
    }
}
