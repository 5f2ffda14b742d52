//! Hosts: the keys and sizes that the format states. Their bytes are among the golden vectors.

mod vectors;

use epochfs_format::{Heartbeat, HostObject, HostOrder, HostPurpose, heartbeat_key, host_order_key, parse_host_key};
use vectors::{REPOSITORY, heartbeat, host_order};

#[test]
fn keys_are_what_the_format_says() {
    let host = *b"the host's id ..";
    let key = heartbeat_key(&host, 17);
    assert_eq!(key, "hosts/74686520686f73742773206964202e2e/0000000000000017");
    assert_eq!(parse_host_key(&key), Some((host, HostObject::Heartbeat(17))));
    let key = host_order_key(&host, 3);
    assert_eq!(key, "hosts/74686520686f73742773206964202e2e/order-0000000000000003");
    assert_eq!(parse_host_key(&key), Some((host, HostObject::Order(3))));
    for key in ["hosts/x/0000000000000017", "hosts/74686520686f73742773206964202e2e/17", "hosts/0000000000000017"] {
        assert_eq!(parse_host_key(key), None, "{key}");
    }
}

#[test]
fn each_purpose_comes_back_and_texts_for_people_are_cut_between_letters() {
    for purpose in HostPurpose::ALL {
        let order = HostOrder { purpose, ..host_order() };
        assert_eq!(HostOrder::decode(&order.encode(), &REPOSITORY).unwrap(), order);
    }
    let long = Heartbeat { name: "\u{fc}".repeat(200), ..heartbeat() };
    assert_eq!(Heartbeat::decode(&long.encode(), &REPOSITORY).unwrap().name, "\u{fc}".repeat(127));
}

/// The sizes that FORMAT.md states.
#[test]
fn sizes_are_the_documented_ones() {
    let whole = heartbeat();
    let mut empty = Heartbeat { name: String::new(), location: String::new(), ..whole };
    empty.features.clear();
    empty.machines.clear();
    empty.warmth.clear();
    assert_eq!(empty.encode().len(), 100);
    let order = HostOrder { by: String::new(), ..host_order() };
    assert_eq!(order.encode().len(), 64);
}
