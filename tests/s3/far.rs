//! A service that is far away: who looks at many things asks for many at once, and is told what a near one would tell.

use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::platform::store::Location;
use serde_json::Value;

use crate::proxy::{Fault, Proxy, Rule};
use crate::server::ceph;
use crate::world::{Host, noise};

const MIB: usize = 1 << 20;
const EPOCHS: usize = 40;
const ROUND_TRIP: Duration = Duration::from_millis(100);

/// What a command prints, but for how long it took; and its exit code.
fn told(host: &Host, arguments: &[&str]) -> (Value, i32) {
    fn without_times(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.retain(|name, _| !name.ends_with("_ms") && name != "elapsed" && name != "repository");
                fields.values_mut().for_each(without_times);
            }
            Value::Array(values) => values.iter_mut().for_each(without_times),
            _ => {}
        }
    }
    let ran = host.run(arguments);
    let mut document = ran.json();
    without_times(&mut document);
    (document, ran.code)
}

#[test]
fn who_looks_at_every_epoch_asks_for_many_things_at_once() {
    let Some(server) = ceph("a service that is far away") else { return };
    let host = Host::new(&server);
    let mut memory = noise(71, 8 * MIB);
    for epoch in 1..=EPOCHS {
        // In each of the four leaves.
        for leaf in 0..4 {
            memory[leaf * 2 * MIB + epoch * 4096] ^= 1;
        }
        assert_eq!(host.commit("web1", &memory).json()["epoch"], epoch as u64);
    }
    let look = |code: i32| {
        for arguments in [
            &["log", "web1", "--json"][..],
            &["stats", "--json"],
            &["stats", "--freed", "--json"],
            &["gc", "plan", "--json"],
            &["verify", "--json"],
        ] {
            let proxy = Proxy::new(server.endpoint());
            proxy.add(Rule::always("", Fault::Late(ROUND_TRIP)));
            let far = Host::at(&server, &host.url, &proxy.url());
            let since = Stopwatch::start();
            let by_far = told(&far, arguments);
            let (took, requests) = (since.elapsed(), proxy.befallen());
            assert_eq!(by_far, told(&host.another(), arguments), "{arguments:?}");
            assert_eq!(by_far.1, if arguments[0] == "verify" { code } else { 0 }, "{arguments:?}");
            assert!(requests > EPOCHS, "{requests} requests of {arguments:?}");
            let in_turn = ROUND_TRIP * u32::try_from(requests).unwrap();
            assert!(took < in_turn / 2, "{arguments:?} took {took:?} for {requests} requests");
            eprintln!("{arguments:?}: {requests} requests in {took:?}");
        }
    };
    look(0);
    // One page of one epoch is damaged: what was read together with others is no less looked at.
    let store = Location::parse(&host.url).unwrap().open_with(&server.settings()).unwrap();
    let mut records = Vec::new();
    store
        .list("machines/web1/log/", None, &mut |info| {
            records.push(info.key);
            Ok(true)
        })
        .unwrap();
    let key = &records[EPOCHS / 2];
    let mut bytes = store.get(key).unwrap().to_vec();
    bytes[1000] ^= 1;
    store.replace(key, &bytes).unwrap();
    look(3);
}
