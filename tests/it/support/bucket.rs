//! A bucket: an S3 server over a directory, which checks signatures.

use std::path::PathBuf;

use axum::Router;
use axum::error_handling::HandleError;
use axum::http::StatusCode;
use s3s::HttpError;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tempfile::TempDir;

use super::serve;

pub(crate) struct Bucket {
    /// `host:port`.
    pub(crate) host: String,
    /// The secret key, which is nowhere else.
    pub(crate) key: String,
    folder: TempDir,
}

impl Bucket {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("bucket")).unwrap();
        let key = uuid::Uuid::new_v4().simple().to_string();
        let mut server = S3ServiceBuilder::new(FileSystem::new(folder.path()).unwrap());
        server.set_auth(SimpleAuth::from_single("archivist", key.as_str()));
        let server = HandleError::new(server.build(), |error: HttpError| async move {
            eprintln!("the bucket's server failed: {error:?}");
            StatusCode::INTERNAL_SERVER_ERROR
        });
        let host = serve(Router::new().fallback_service(server)).await.to_string();
        Self { host, key, folder }
    }

    /// The variables of a service that archives there, by way of a host.
    pub(crate) fn variables(&self, host: &str) -> Vec<(&'static str, String)> {
        vec![
            ("NOMAD_BUILD_ARCHIVE", "s3://bucket/prefix".to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://{host}")),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_ACCESS_KEY_ID", "archivist".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", self.key.clone()),
        ]
    }

    /// The file of an object below the prefix.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.folder.path().join("bucket/prefix").join(path)
    }
}
