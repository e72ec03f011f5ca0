// A joint n-gram model of letters and phonemes (Bisani and Ney 2008, "Joint-sequence models for grapheme-to-phoneme
// conversion"), read from an ARPA file, its units written as Phonetisaurus does: "p|h}F", "e}_".
//
//   joint MODEL.arpa nbest N BEAM < words    lines of word, pronunciation, ln p(word, pronunciation); N a word, best first
//   joint MODEL.arpa sample N SEED           N words, a line each, drawn from a model of single letters
//
// Beside a decoder that follows single alignments, this one sums probabilities over all alignments inside its beam.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr double kLn10 = 2.302585092994046;  // ARPA files hold base-10 logarithms
constexpr double kImpossible = -1e9;
constexpr size_t kLongestUnit = 2;     // letters of a unit, as the aligner was told
constexpr double kExpanded = 14;       // how far behind the best a hypothesis may be and still go on
constexpr double kKept = 22;           // how far behind it may be and still be kept
constexpr size_t kLongestSample = 40;  // letters of a sampled word

// A back-off n-gram model. A state is a node of the tree of its n-grams: the context that the next token sees.
class Ngrams {
 public:
  explicit Ngrams(const char* path) {
    std::ifstream in(path);
    if (!in) {
      std::fprintf(stderr, "%s: cannot be read\n", path);
      std::exit(1);
    }
    nodes_.push_back({0, 0, 0, true});
    children_.reserve(4'000'000);
    std::vector<std::pair<int, std::vector<int>>> read;
    int order = 0;
    for (std::string line; std::getline(in, line);) {
      if (line.size() > 1 && line[0] == '\\') {
        if (std::sscanf(line.c_str(), "\\%d-grams:", &order) != 1) order = 0;
      } else if (order && !line.empty()) {
        read.push_back(Add(line, order));
      }
    }
    for (const auto& [node, tokens] : read) nodes_[node].shorter = LongestSuffix(tokens);
    begin = Child(0, Id("<s>"));
    end = Id("</s>");
  }

  // ln p(token | state); the state moves on.
  double Step(int& state, int token) const {
    double log_p = 0;
    int next;
    while ((next = Child(state, token)) < 0) {
      if (!state) return kImpossible;
      log_p += nodes_[state].back_off;
      state = nodes_[state].shorter;
    }
    log_p += nodes_[next].log_p;
    for (state = next; state && !nodes_[state].inner;) state = nodes_[state].shorter;
    return log_p;
  }

  std::vector<std::string> names;  // of the tokens
  int begin = 0;                   // state before the first token
  int end = 0;                     // the token after the last

 private:
  struct Node {
    double log_p, back_off;
    int shorter;  // the node of the same n-gram without its oldest tokens
    bool inner;   // there are n-grams that begin with it
  };

  static uint64_t Key(int node, int token) { return uint64_t(node) << 20 | uint64_t(token); }

  int Id(const std::string& name) {
    const auto [found, is_new] = ids_.try_emplace(name, int(names.size()));
    if (is_new) names.push_back(name);
    return found->second;
  }

  int Child(int node, int token) const {
    const auto found = children_.find(Key(node, token));
    return found == children_.end() ? -1 : found->second;
  }

  std::pair<int, std::vector<int>> Add(const std::string& line, int order) {
    std::istringstream in(line);
    double log_p, back_off = 0;
    in >> log_p;
    std::vector<int> tokens;
    int node = 0;
    for (std::string name; int(tokens.size()) < order && in >> name;) {
      tokens.push_back(Id(name));
      const auto [found, is_new] = children_.try_emplace(Key(node, tokens.back()), int(nodes_.size()));
      if (is_new) nodes_.push_back({-99, 0, 0, false});
      nodes_[node].inner = true;
      node = found->second;
    }
    in >> back_off;
    nodes_[node].log_p = log_p * kLn10;
    nodes_[node].back_off = back_off * kLn10;
    return {node, tokens};
  }

  int LongestSuffix(const std::vector<int>& tokens) const {
    for (size_t first = 1; first < tokens.size(); first++) {
      int node = 0;
      for (size_t i = first; i < tokens.size() && node >= 0; i++) node = Child(node, tokens[i]);
      if (node >= 0) return node;
    }
    return 0;
  }

  std::vector<Node> nodes_;
  std::unordered_map<uint64_t, int> children_;
  std::unordered_map<std::string, int> ids_;
};

struct Unit {
  int token;
  std::vector<std::string> phonemes;
};

using Units = std::unordered_map<std::string, std::vector<Unit>>;  // by their letters

Units ReadUnits(const Ngrams& model) {
  Units units;
  for (size_t token = 0; token < model.names.size(); token++) {
    const std::string& name = model.names[token];
    const size_t middle = name.find('}');
    if (middle == std::string::npos) continue;
    std::string letters, part;
    for (char c : name.substr(0, middle))
      if (c != '|') letters += c;
    Unit unit{int(token), {}};
    std::istringstream in(name.substr(middle + 1));
    while (std::getline(in, part, '|'))
      if (part != "_") unit.phonemes.push_back(part);
    units[letters].push_back(unit);
  }
  return units;
}

// ln(e^a + e^b)
double Add(double a, double b) { return std::max(a, b) + std::log1p(std::exp(-std::abs(a - b))); }

struct Hypothesis {
  int state;
  double log_p;
  std::string spoken;  // phonemes, a space after each
};

// Hypotheses that have read as many letters. Those of one pronunciation and one state go on alike, so they are one.
class Front {
 public:
  void Take(Hypothesis hypothesis) {
    const std::string key = std::to_string(hypothesis.state) + " " + hypothesis.spoken;
    const auto [found, is_new] = places_.try_emplace(key, hypotheses.size());
    if (is_new)
      hypotheses.push_back(std::move(hypothesis));
    else
      hypotheses[found->second].log_p = Add(hypotheses[found->second].log_p, hypothesis.log_p);
  }

  void KeepBest(size_t count) {
    const auto better = [](const Hypothesis& a, const Hypothesis& b) { return a.log_p > b.log_p; };
    if (hypotheses.size() > count) {
      std::nth_element(hypotheses.begin(), hypotheses.begin() + count, hypotheses.end(), better);
      hypotheses.resize(count);
    }
  }

  std::vector<Hypothesis> hypotheses;

 private:
  std::unordered_map<std::string, size_t> places_;
};

void PrintBest(const Ngrams& model, const Units& units, const std::string& word, size_t count, size_t beam) {
  std::vector<Front> fronts(word.size() + 1);
  fronts[0].Take({model.begin, 0, ""});
  for (size_t read = 0; read < word.size(); read++) {
    fronts[read].KeepBest(beam);
    double best = kImpossible;
    for (const auto& hypothesis : fronts[read].hypotheses) best = std::max(best, hypothesis.log_p);
    for (size_t more = 1; more <= kLongestUnit && read + more <= word.size(); more++) {
      const auto found = units.find(word.substr(read, more));
      if (found == units.end()) continue;
      for (const auto& hypothesis : fronts[read].hypotheses) {
        if (hypothesis.log_p < best - kExpanded) continue;
        for (const Unit& unit : found->second) {
          Hypothesis next = hypothesis;
          next.log_p += model.Step(next.state, unit.token);
          if (next.log_p < best - kKept) continue;
          for (const auto& phoneme : unit.phonemes) next.spoken += phoneme + " ";
          fronts[read + more].Take(std::move(next));
        }
      }
    }
  }
  std::unordered_map<std::string, double> totals;
  for (const auto& hypothesis : fronts[word.size()].hypotheses) {
    int state = hypothesis.state;
    const double log_p = hypothesis.log_p + model.Step(state, model.end);
    const auto [found, is_new] = totals.try_emplace(hypothesis.spoken, log_p);
    if (!is_new) found->second = Add(found->second, log_p);
  }
  std::vector<std::pair<double, std::string>> answers;
  for (const auto& [spoken, log_p] : totals)
    if (!spoken.empty()) answers.emplace_back(log_p, spoken.substr(0, spoken.size() - 1));
  std::sort(answers.rbegin(), answers.rend());
  answers.resize(std::min(answers.size(), count));
  for (const auto& [log_p, spoken] : answers) std::printf("%s\t%s\t%.4f\n", word.c_str(), spoken.c_str(), log_p);
}

void PrintSamples(const Ngrams& model, int count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<int> tokens;
  for (size_t token = 0; token < model.names.size(); token++)
    if (model.names[token] != "<s>" && model.names[token] != "<unk>") tokens.push_back(int(token));
  std::vector<double> share(tokens.size());
  while (count--) {
    std::string word;
    for (int state = model.begin; word.size() < kLongestSample;) {
      double total = 0;
      for (size_t i = 0; i < tokens.size(); i++) {
        int next = state;
        total += share[i] = std::exp(model.Step(next, tokens[i]));
      }
      double rest = unit(random) * total;
      size_t chosen = 0;
      while (chosen + 1 < tokens.size() && (rest -= share[chosen]) > 0) chosen++;
      if (tokens[chosen] == model.end) break;
      word += model.names[tokens[chosen]];
      model.Step(state, tokens[chosen]);
    }
    std::puts(word.c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string command = count == 5 ? arguments[2] : "";
  if (command == "sample") {
    PrintSamples(Ngrams(arguments[1]), std::atoi(arguments[3]), std::strtoull(arguments[4], nullptr, 10));
  } else if (command == "nbest") {
    const Ngrams model(arguments[1]);
    const Units units = ReadUnits(model);
    for (std::string word; std::getline(std::cin, word);)
      PrintBest(model, units, word, std::strtoul(arguments[3], nullptr, 10), std::strtoul(arguments[4], nullptr, 10));
  } else {
    std::fprintf(stderr, "usage: joint MODEL.arpa nbest N BEAM < words | joint MODEL.arpa sample N SEED\n");
    return 2;
  }
}
