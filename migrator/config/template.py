"""The commented `migrations.yaml` that `migrator init` writes."""

TEMPLATE = """\
# What migrator upgrades, and how. `migrator config --schema` prints the JSON Schema of this file.
# Relative paths start from this file's folder. ${NAME} and ${NAME:-default} in a value come from the environment.
version: 1

# Where progress is kept: a SQLite file, or postgresql+psycopg://user:${PGPASSWORD}@host/database
ledger: sqlite:///migrator.db

# Plans, checkpoints, undo logs and reports.
artifacts: ./artifacts

migrations:
  # The migration's name, used on the command line: a-z, 0-9, dot, underscore, hyphen.
  my-collection-v2:
    # Where the vectors lie. A FAISS collection is a folder with index.faiss and items.parquet (column id, else the row
    # number is the id, and any payload columns); for files of other names give index and items in place of path.
    store:
      kind: faiss
      path: ./gallery

    # Where the images lie. uri is filled from each item's payload, and {id}; nothing outside root is read.
    images:
      uri: "{path}"
      root: ./images            # a folder, https://host/products/, or an fsspec URL such as s3://bucket/products

    # The encoder that made the stored vectors: a timm architecture, its weights and its preprocessing.
    # Where there is no model of it any more, the one word `stored` in place of all this.
    old_encoder:
      arch: resnet18                      # or module: package.module:factory, or weights: model.onnx alone
      weights: ./old.safetensors
      dim: 128
      image_size: 224
      # mean: [0.485, 0.456, 0.406]       # default: ImageNet's
      # std: [0.229, 0.224, 0.225]
      # resize: squash                    # or crop, letterbox, border, which keep the shape
      # crop_pct: 1.0                     # scale to image_size / crop_pct first
      # interpolation: bilinear           # or nearest, bicubic, lanczos, box, hamming
      # exif: apply                       # or ignore, as Image.open(file).convert("RGB") does
      # alpha: white                      # below transparent pixels; or drop, as convert("RGB") does
      # antialias: true                   # or false, as cv2.resize does

    # The encoder to move to. It has the same dim. Without weights, `migrator train` makes them.
    new_encoder:
      arch: resnet50
      dim: 128
      image_size: 224
      # weights: ./new.safetensors
      # pretrained: true                  # training starts from timm's weights, which are downloaded
      # preprocessing: timm               # image_size, mean, std and the rest as timm's data config has them

    # Training images: CSV or Parquet with the columns path and label.
    train:
      items: ./train.csv
      method: advbct
      epochs: 10
      batch_size: 128
      seed: 0
      # flip: true                        # mirror images at random; wrong for digits and writing

    # What the new encoder must show before queries move to it.
    verify:
      queries: ./queries.csv              # path, label; without it items of the collection are the queries
      label: "{category}"                 # the payload field that says which items belong together
      # segment: "{shop}"                 # results and thresholds for each group of queries
      sample: 500                         # queries
      gate:
        metric: map@100                   # or recall@k, precision@k, ndcg@k, mrr@k
        confidence: 0.95
        min_gain: 0.0                     # over today; {lowest: -0.03} accepts a loss during the backfill only
        # thresholds: [{metric: recall@1, min: 0.9}, {metric: map@100, min_gain: -0.02, segment: "*"}]

    # Percent of the queries on the new encoder, step by step.
    rollout:
      strategy: in_place
      canary: [1, 10, 50, 100]
      # route_ttl: 5.0                    # seconds for which the application may keep a row of the route

    # Re-embedding the stored images, in chunks that can be resumed.
    backfill:
      chunk_size: 1000
      batch_size: 64
      # nice: 1.0                         # rest as long as each batch took
      # order: worst_first                # begin with the items that search finds worst
"""
