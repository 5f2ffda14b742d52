//! What cannot work is told for what it is, with the next step, and without a secret.

use epochfs::platform::clock::Stopwatch;

use crate::proxy::{Fault, Proxy, Rule};
use crate::server::ceph;
use crate::world::{Host, Ran, ran};

#[track_caller]
fn refused(ran: &Ran, code: i32, words: &[&str]) {
    assert_eq!(ran.code, code, "{}{}", ran.out, ran.err);
    for word in words {
        assert!(ran.err.contains(word), "the error does not say {word:?}: {}", ran.err);
    }
}

#[test]
fn wrong_credentials_are_told_and_never_shown() {
    let Some(server) = ceph("wrong credentials") else { return };
    let host = Host::new(&server);
    let run = |change: &dyn Fn(&mut std::process::Command)| {
        let mut command = host.command(["-vv", "ls"]);
        change(&mut command);
        ran(command.output().unwrap())
    };
    let wrong = run(&|command| {
        command.env("AWS_SECRET_ACCESS_KEY", "averysecretwrongsecret");
    });
    refused(&wrong, 1, &["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"]);
    let unknown = run(&|command| {
        command.env("AWS_ACCESS_KEY_ID", "NOSUCHKEY");
    });
    refused(&unknown, 1, &["InvalidAccessKeyId", "credentials"]);
    let none = run(&|command| {
        command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    });
    refused(&none, 2, &["no credentials", "~/.aws/credentials"]);
    // In a file, as the service's own tools keep them.
    let (id, secret) = (&server.variables["AWS_ACCESS_KEY_ID"], &server.variables["AWS_SECRET_ACCESS_KEY"]);
    std::fs::create_dir(host.path(".aws")).unwrap();
    let text = format!("[ceph]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
    std::fs::write(host.path(".aws/credentials"), text).unwrap();
    let profile = run(&|command| {
        command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY").env("AWS_PROFILE", "ceph");
    });
    assert_eq!(profile.code, 0, "{}", profile.err);
    for Ran { out, err, .. } in [wrong, unknown, none, profile, host.ok(["-vv", "ls"]), host.ok(["-vv", "doctor"])] {
        for shown in [out, err] {
            assert!(!shown.contains(secret.as_str()) && !shown.contains("averysecretwrongsecret"), "{shown}");
        }
    }
    let in_url = ran(host.command(["--repo", "s3://key:averysecretwrongsecret@b/p", "ls"]).output().unwrap());
    refused(&in_url, 2, &["environment"]);
    assert!(!in_url.err.contains("averysecretwrongsecret"));
}

#[test]
fn a_bucket_or_repository_that_is_not_there_is_told() {
    let Some(server) = ceph("a bucket that is not there") else { return };
    let host = Host::at(&server, "s3://nosuchbucket/p", server.endpoint());
    refused(&host.run(["ls"]), 5, &["NoSuchBucket", "make the bucket"]);
    refused(&host.run(["init"]), 5, &["NoSuchBucket", "make the bucket"]);
    refused(&Host::empty(&server).run(["ls"]), 5, &["holds no repository", "init"]);
    refused(&Host::at(&server, "s3://", server.endpoint()).run(["ls"]), 2, &["names no bucket"]);
}

#[test]
fn a_service_that_is_not_there_is_given_up_in_time() {
    let Some(server) = ceph("a service that is not there") else { return };
    let mut host = Host::at(&server, "s3://epochs/p", "http://127.0.0.1:1");
    host.patience_s = 2;
    let began = Stopwatch::start();
    refused(&host.run(["ls"]), 1, &["Connection refused", "check the endpoint"]);
    assert!(began.elapsed().as_secs() < 8, "{:?}", began.elapsed());
}

#[test]
fn tls_is_checked_and_works() {
    let Some(server) = ceph("TLS") else { return };
    let host = Host::new(&server);
    let (gateway, certificate) = (&server.variables["TLS_GATEWAY"], &server.variables["TLS_CERTIFICATE"]);
    let mut untrusted = host.command(["ls"]);
    untrusted.env("AWS_ENDPOINT_URL", gateway);
    refused(&ran(untrusted.output().unwrap()), 1, &["certificate", "AWS_CA_BUNDLE"]);
    let mut trusted = host.command(["ls"]);
    trusted.env("AWS_ENDPOINT_URL", gateway).env("AWS_CA_BUNDLE", certificate);
    let trusted = ran(trusted.output().unwrap());
    assert_eq!(trusted.code, 0, "{}", trusted.err);
    let mut plain = host.command(["ls"]);
    plain.env("AWS_ENDPOINT_URL", server.endpoint().replace("http://", "https://")).env("EPOCHFS_STORE_TIMEOUT", "3");
    refused(&ran(plain.output().unwrap()), 1, &["cannot read"]);
}

#[test]
fn a_wrong_clock_and_other_answers_are_explained() {
    let Some(server) = ceph("a wrong clock") else { return };
    let host = Host::new(&server);
    let answers = [
        ("403 Forbidden", "RequestTimeTooSkewed", "clock"),
        ("403 Forbidden", "AccessDenied", "what they allow"),
        ("301 Moved Permanently", "PermanentRedirect", "AWS_REGION"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "AWS_REGION"),
        ("403 Forbidden", "QuotaExceeded", "quota"),
    ];
    for (status, code, advice) in answers {
        let proxy = Proxy::new(server.endpoint());
        proxy.add(Rule::always("", Fault::Answer(status, code)));
        let through = Host::at(&server, &host.url, &proxy.url());
        refused(&through.run(["ls"]), 1, &[advice]);
    }
}
