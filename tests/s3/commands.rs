//! Each command on a repository in a bucket.

use epochfs::platform::store::Location;

use crate::server::ceph;
use crate::world::{Host, noise};

const MIB: usize = 1 << 20;

#[test]
fn p1_what_is_committed_is_exported_byte_for_byte_by_a_host_that_knows_nothing() {
    let Some(server) = ceph("what is committed is exported") else { return };
    each_command(&Host::new(&server));
}

#[test]
fn p1_an_encrypted_repository_does_the_same_and_says_nothing_without_its_key() {
    let Some(server) = ceph("an encrypted repository") else { return };
    let host = Host::sealed(&server);
    each_command(&host);
    let stranger = Host::at(&server, &host.url, server.endpoint());
    let refused = stranger.run(["ls"]);
    assert!(refused.code != 0 && refused.err.contains("key"), "{}", refused.err);
    // What is in the bucket, as whoever has the credentials reads it.
    let store = Location::parse(&host.url).unwrap().open_with(&server.settings()).unwrap();
    let (mut objects, mut sealed) = (0, 0);
    store
        .list("", None, &mut |info| {
            let bytes = store.get(&info.key)?;
            // Long enough not to be there by chance.
            let is_plain = [&b"EPOCH"[..], b"machines/", b"\"memory\""]
                .iter()
                .any(|text| bytes.windows(text.len()).any(|some| some == *text));
            objects += 1;
            sealed += usize::from(!is_plain);
            Ok(true)
        })
        .unwrap();
    // The descriptor says of itself what it is, and with it how the key is wrapped.
    assert!(objects > 5 && sealed + 1 >= objects, "{sealed} of {objects}");
}

/// What all commands do with a repository, of which another host knows nothing.
fn each_command(host: &Host) {
    // Large enough for a pack of several parts, with zeros and with what compresses.
    let mut memory = noise(1, 20 * MIB);
    memory[3 * MIB..5 * MIB].fill(0);
    memory[7 * MIB..9 * MIB].fill(7);
    assert_eq!(host.commit("web1", &memory).json()["epoch"], 1);
    let first = memory.clone();
    memory[12345..12400].copy_from_slice(&noise(2, 55));
    memory[15 * MIB..15 * MIB + 700_000].copy_from_slice(&noise(3, 700_000));
    assert_eq!(host.commit("web1", &memory).json()["epoch"], 2);
    let other = host.another();
    assert!(other.memory("web1@1") == first && other.memory("web1") == memory);
    other.ok(["clone", "web1@1", "web2"]);
    other.ok(["tag", "web1@1", "before"]);
    assert!(host.memory("web2") == first && host.memory("web1@before") == first);
    host.ok(["rm", "web1@1", "--yes"]);
    assert_eq!(other.run(["show", "web1@1"]).code, 5);
    assert!(other.memory("web2") == first);
    other.ok(["verify"]);
    for arguments in
        [&["log", "web1"][..], &["ls"], &["stats"], &["diff", "web2", "web1"], &["show", "web1"], &["status"]]
    {
        other.ok(arguments);
    }
    assert_eq!(host.run(["init"]).code, 4);
}

#[test]
fn what_is_in_the_repository_already_is_found_again_and_small_commits_take_one_object() {
    let Some(server) = ceph("small commits take one object") else { return };
    let host = Host::new(&server);
    let mut memory = noise(4, 8 * MIB);
    host.commit("web1", &memory);
    // The same pages elsewhere, in another machine.
    memory.rotate_left(MIB);
    let second = host.commit("web2", &memory).json();
    assert_eq!(second["new_pages"], 0, "{second}");
    memory[0] ^= 1;
    let third = host.commit("web2", &memory).json();
    assert_eq!(third["new_pages"], 1, "{third}");
    let objects = || host.ok(["verify", "--json"]).json()["objects"].as_u64().unwrap();
    let before = objects();
    memory[0] ^= 2;
    host.commit("web2", &memory);
    assert_eq!(objects(), before + 1);
}

#[test]
fn the_mount_keeps_what_is_written_and_a_host_without_state_finds_it() {
    if !rustix::process::geteuid().is_root() {
        return crate::server::skip("a mount of a bucket", "only root mounts here");
    }
    let Some(server) = ceph("a mount of a bucket") else { return };
    let host = Host::new(&server);
    let at = host.path("mount");
    std::fs::create_dir(&at).unwrap();
    let mount = at.to_str().unwrap();
    host.ok(["mount", mount, "--background"]);
    let memory = noise(5, 6 * MIB);
    std::fs::create_dir(at.join("web1")).unwrap();
    std::fs::write(at.join("web1/live/memory"), &memory).unwrap();
    std::fs::create_dir(at.join("web1/epochs/first")).unwrap();
    // Not committed: it is there again with the next mount of this host.
    std::fs::write(at.join("web1/live/later"), b"kept").unwrap();
    assert!(host.ok(["status"]).out.contains(&host.url));
    host.ok(["umount", mount]);
    host.ok(["mount", mount, "--background"]);
    assert_eq!(std::fs::read(at.join("web1/live/later")).unwrap(), b"kept");
    assert!(std::fs::read(at.join("web1/epochs/first/memory")).unwrap() == memory);
    host.ok(["commit", "web1", "--tag", "second"]);
    host.ok(["umount", mount]);
    let other = host.another();
    let at = other.path("mount");
    std::fs::create_dir(&at).unwrap();
    other.ok(["mount", at.to_str().unwrap(), "--background"]);
    assert!(std::fs::read(at.join("web1/latest/memory")).unwrap() == memory);
    assert_eq!(std::fs::read(at.join("web1/live/later")).unwrap(), b"kept");
    other.ok(["umount", at.to_str().unwrap()]);
    other.ok(["verify"]);
}
