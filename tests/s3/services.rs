//! Other services: one that is as good, and one that must be refused.

use std::sync::Arc;

use crate::server::{Server, cached, has, seaweedfs, skip};
use crate::world::{Host, noise};

#[test]
fn seaweedfs_is_fit_and_what_was_acknowledged_outlives_it() {
    let Some(server) = seaweedfs("SeaweedFS") else { return };
    let server = Arc::new(server);
    let host = Host::new(&server);
    let mut memory = noise(21, 10 << 20);
    for round in 0..3 {
        memory[round] ^= 1;
        assert_eq!(host.commit("web1", &memory).code, 0);
    }
    server.run("kill", &[]);
    server.run("start", &[]);
    assert!(host.another().memory("web1") == memory);
    memory[9] ^= 1;
    assert_eq!(host.commit("web1", &memory).json()["epoch"], 4);
    host.ok(["verify"]);
}

/// P3 rests on it: a service that lets two win must be noticed, however politely it refuses when it is asked alone.
#[test]
fn p3_a_service_that_lets_several_writers_win_is_refused() {
    if !has(&cached("S3S_FS", "s3s-fs/bin/s3s-fs")) {
        return skip("a service that lets several writers win", "s3s-fs is not installed: run scripts/setup");
    }
    let server = Arc::new(Server::up("s3s-fs", &[]));
    let host = Host::empty(&server);
    let refused = host.run(["init"]);
    assert_eq!(refused.code, 1, "{}", refused.err);
    for words in ["racing writers", "not safe", "two hosts could both believe", "If-None-Match"] {
        assert!(refused.err.contains(words), "{}", refused.err);
    }
    assert_eq!(host.run(["ls"]).code, 5, "nothing was made");
}
