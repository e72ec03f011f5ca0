#!/bin/bash
# The pairs that the shipped model learnt from beside the dictionary, made anew: run.sh FOLDER TEACHER [SPLIT]
# TEACHER is a checkpoint, SPLIT the folder of the published split; FOLDER/extra.tsv is what comes out. Needs g++; about an
# hour on one core. SAMPLES, SEED and WORDS from the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 teacher=$2 split=${3:-../shared/data/cmudict-0.7b}
python=$here/../../.venv/bin/python
distil() { PYTHONPATH=$here/../.. "$python" "$here/distil.py" "$@"; }

mkdir -p "$folder"
test -x "$folder/venv/bin/pip" || python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check phonetisaurus==0.3.0
tools=$(echo "$folder"/venv/lib/python3.11/site-packages/phonetisaurus)
g++ -O2 -std=c++17 -o "$folder/joint" "$here/joint.cpp"
tool() { LD_LIBRARY_PATH="$tools/lib/x86_64" "$tools/bin/x86_64/$1" "${@:2}"; }

echo "letters and phonemes aligned, and n-grams of both together and of letters alone"
distil lexicon "$folder" --data "$split"
tool phonetisaurus-align --input="$folder/train.lex" --ofile="$folder/corpus" \
  --seq1_del=false --seq2_del=true --seq1_max=2 --seq2_max=2 --grow=false
tool estimate-ngram -o 8 -s FixKN -t "$folder/corpus" -wl "$folder/joint8.arpa"
tool estimate-ngram -o 6 -s FixKN -t "$folder/letters.txt" -wl "$folder/letters6.arpa"

echo "pseudo-words, the joint model's best pronunciations of each, and the teacher's opinion of these"
"$folder/joint" "$folder/letters6.arpa" sample "${SAMPLES:-1500000}" "${SEED:-1}" > "$folder/samples"
distil words "$folder/samples" "$folder/all.words" --data "$split"
head -n "${WORDS:-600000}" "$folder/all.words" > "$folder/pseudo.words"
"$folder/joint" "$folder/joint8.arpa" nbest 6 50 < "$folder/pseudo.words" > "$folder/candidates"
distil score "$folder/candidates" "$folder/scored" "$teacher"
distil mix "$folder/scored" "$folder/extra.tsv" --data "$split"
